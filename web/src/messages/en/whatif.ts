export default {
  title: 'What if an expert were missing?',
  sentence: 'Switch experts off, or force one, and read both continuations.',
};
