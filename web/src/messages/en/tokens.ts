export default {
  title: 'What does the model read?',
  sentence: 'Text is cut into tokens, and each token stands for a list of numbers.',
  split: 'Token, its number, its bytes',
  legend: 'What was frequent in the tokenizer’s own training text is one token; what was rare there, even a common character, falls into pieces of its bytes.',
  vector: '“{text}” as {n} numbers',
  vectorLabel: 'Embedding of the token: blue below zero, orange above',
  neighbours: 'Tokens with a similar vector',
  neighboursLegend: '1 would be the same direction, 0 nothing in common (cosine).',
};
