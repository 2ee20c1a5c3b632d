export default {
  title: 'What comes next?',
  sentence: 'The model gives every token a probability; one is picked.',
};
