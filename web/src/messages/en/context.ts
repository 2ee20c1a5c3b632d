export default {
  title: 'How long can a text be?',
  sentence: 'Every token leaves numbers behind in a cache, for later ones to look back at. Latent attention leaves few.',
  tokens: 'Length of the text',
  window: '(context: {n} tokens)',
  capped: 'Longer than this model reads: {n} tokens at most, so the bars are of those.',
  full: 'Plain attention',
  note: 'Counted over all layers at two bytes a number. Experts change nothing here; the kind of attention does.',
};
