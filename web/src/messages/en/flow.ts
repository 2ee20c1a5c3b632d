export default {
  title: 'What happens to one token?',
  sentence: 'Everything a token goes through before the next one is picked.',
};
