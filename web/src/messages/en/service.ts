export default {
  title: 'How fast can it be served, and on what?',
  sentence: 'To write one token for one reader, the weights at work must be read from memory. That sets the limit.',
  table: 'Tokens a second at most, for one text, with a byte for each weight',
  reads: 'weights read for a token',
  laptop: 'Laptop',
  server: 'Server processor',
  gpu: 'One H100',
  node: 'Eight H200',
  denseTwin: 'A dense model as large as {name}',
  note: 'A bound from memory bandwidth alone (makers’ figures). In brackets: the weights do not fit there; R1’s need 671 GB. Many texts at once share what is read, so a service makes far more tokens in all. On processors, libraries such as oneDNN and kernels like moescope’s own bring the arithmetic up to that bound.',
  offered: 'DeepSeek-R1 is open and offered by many as a service, NVIDIA NIM, Fireworks and Cerebras among them: slower or faster, dearer or cheaper, by the machines they have. “moescope plan” computes this for your machine.',
};
