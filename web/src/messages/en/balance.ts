export default {
  title: 'Is the work shared fairly?',
  sentence: 'Every expert should be busy, and each with its own kind of text.',
  text: 'Which text',
  own: 'Your text ({n} tokens)',
  compare: 'Beside it: without the balancing bias',
  asIs: 'As the model is',
  withoutBias: 'Without its balancing bias',
  map: 'Load of every expert; rows are layers, columns are experts',
  mapWithoutBias: 'Load of every expert without the balancing bias',
  axis: 'expert →   (rows: layers; at the end of a row: its busiest expert)',
  legend: 'Colours: from idle over an even share to {most} times an even share or more',
  even: 'even share',
  read: 'Layer {layer}, expert {expert}: {share} of the work, {times} times an even share',
  facts: '{idle} of {total} experts have had nothing to do; the busiest, expert {expert} of layer {layer}, has {busiest} times an even share.',
  explain:
    'In training, an expert with too much work has its bias lowered a little after every step, and one with too little has it raised. The bias moves the choice, not the weights, so no second loss disturbs what is learned. A short text never fills all experts; the kinds of text are measured on much more.',
  information: 'Bits that an expert tells about the kind of text, by layer:',
};
