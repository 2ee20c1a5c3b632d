export default {
  title: 'Who is asked?',
  sentence: 'The router scores every expert, and only the best few are asked.',
};
