export default {
  title: 'Can it work something out?',
  sentence: 'Asked for a sum, it writes its steps between <think> and </think> first.',
};
