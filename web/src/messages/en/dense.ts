export default {
  title: 'Why not ask everyone?',
  sentence: 'A dense model of the same cost beside it, on the same text.',
};
