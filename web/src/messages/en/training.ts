export default {
  title: 'How did it learn this?',
  sentence: 'Its own training, replayed: the loss falls, the experts drift apart.',
};
