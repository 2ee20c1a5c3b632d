export default {
  title: 'Watch a mixture of experts think',
  sentence: 'Write something and press play. The model goes on, and every picture shows what it computes, now.',
  label: 'Your text',
  length: 'Tokens to write',
  examples: 'Examples',
  counter: 'Share of the model that worked on this token',
  of: '{used} of {total}',
  domain_poetry: 'Poetry',
  domain_prose: 'Prose',
  domain_code: 'Code',
  domain_translation: 'Translation',
  domain_arithmetic: 'Arithmetic',
};
