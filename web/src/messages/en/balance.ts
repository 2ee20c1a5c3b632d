export default {
  title: 'Is the work shared fairly?',
  sentence: 'Every expert should be busy, and each with its own kind of text.',
};
