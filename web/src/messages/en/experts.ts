export default {
  title: 'What do the experts do?',
  sentence: 'Only a few work on this token; the shared ones always do.',
};
