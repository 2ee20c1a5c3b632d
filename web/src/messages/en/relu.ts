export default {
  title: 'Can the choice be without a jump?',
  sentence: 'Softmax with top-k always asks the same number; a ReLU router (ReMoE) asks as many as have a score above zero.',
  softmax: 'Softmax, top-k',
  relu: 'ReLU',
  jump: 'Top-k: at the line an expert’s weight jumps from nothing to something. No gradient tells the router what lies beyond the jump.',
  bend: 'ReLU: the weight grows from zero without a jump, so gradients flow from end to end, and the number of experts follows the token.',
  counts: 'Experts asked for each token of your text, in layer {layer} (of {total} experts)',
  row: '{rule}: {asked}',
  always: 'always {n}',
  mean: '{n} on average, {low} to {high}',
  note: 'This model was trained with its own rule; the bars show whom the same scores would call under another one. A model trained with ReLU keeps the average low by a penalty.',
};
