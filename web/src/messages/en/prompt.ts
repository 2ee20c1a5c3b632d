export default {
  title: 'Watch a mixture of experts think',
  sentence: 'Type something and press play: the model goes on, and every picture below shows what it computes.',
};
