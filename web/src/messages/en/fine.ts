export default {
  title: 'Why many small experts, and why shared ones?',
  sentence: 'Cut each expert into pieces and ask for more of them: the work stays, the ways to combine them explode.',
  cut: 'Each large expert cut into',
  pieces: '{n}',
  withShared: 'One shared expert for what all need',
  ways: '{k} of {n}: {ways} ways to choose, at equal work',
  picture: '{n} experts of which {k} are lit',
  commonWhy: 'Grey is what every expert has to learn alike, grammar and such: kept in each of them over and over.',
  sharedWhy: 'A shared expert, which is always asked, learns the common part once. The routed ones are free for what is particular.',
  own: '{name} asks {k} of {n}: {ways} ways.',
  explain: 'This is DeepSeekMoE’s own example (Dai et al. 2024): 16 experts of which {work} are asked, each cut into 4, become 64 of which 8 are asked. A lit area is work; it stays the same.',
};
