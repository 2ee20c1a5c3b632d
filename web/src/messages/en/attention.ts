export default {
  title: 'What does it look back at?',
  sentence: 'Before it meets the experts, the token gathers what it needs from the tokens before it.',
  heads: 'Whose view',
  mean: 'all heads, averaged',
  head: 'head {n}',
  count: '{n} heads',
  label: 'Attention of “{text}”, {name}',
  cache: 'What one layer must remember of each token, in numbers',
  cacheLabel: 'The latent cache keeps {kept} numbers, a full one would keep {full}',
  full: 'In full',
  latent: 'Latent',
};
