export default {
  title: 'How do their answers become one?',
  sentence: 'Each answer is multiplied by its weight, then all are added up.',
};
