export default {
  title: 'What does it look back at?',
  sentence: 'Before the experts, the token gathers what it needs from earlier tokens.',
};
