export default {
  title: 'What does the model read?',
  sentence: 'Text is cut into tokens, and each token becomes a list of numbers.',
};
