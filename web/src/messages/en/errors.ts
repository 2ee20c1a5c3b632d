/** What the server refuses, by its codes. */
export default {
  context_full: 'This text has {n} tokens; the model’s context holds {max}. Please shorten it.',
  text_too_long: 'This text has {n} characters; up to {max} fit. Please shorten it.',
  prompt_empty: 'Write a few words first.',
  no_tokenizer: 'This model came without a tokenizer, so it reads and writes no text.',
  packed: 'These experts are packed for fast computing, and their insides cannot be taken out. Opened without rounding (moescope open … --backend torch) they can.',
  no_specialization: 'Nobody has measured yet what these experts specialise in; “moescope specialize” does.',
  no_history: 'This model brings no history of its training.',
  no_dense: 'This model comes without a dense twin.',
  no_unbalanced: 'This model comes without a copy trained without balancing.',
  dense_broken: 'The dense twin cannot be opened: {problem}',
  unbalanced_broken: 'The copy trained without balancing cannot be opened: {problem}',
  no_experts: 'This model has no routed experts, so there is no router to change.',
  all_disabled: 'All {n} experts of layer {layer} are switched off; leave one on.',
  off_and_forced: 'Expert {expert} of layer {layer} is both switched off and forced; choose one.',
};
