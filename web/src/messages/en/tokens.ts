export default {
  title: 'What does the model read?',
  sentence: 'Text is cut into tokens, and each token stands for a list of numbers.',
  split: 'Token, its number, its bytes',
  legend: 'What was frequent in the tokenizer’s own training text is one token; what was rare there, even a common character, falls into pieces of its bytes.',
  vector: '“{text}” as {n} numbers',
  vectorLabel: 'Embedding of the token: blue below zero, orange above',
  neighbours: 'Tokens with a similar vector',
  neighboursLegend: '1 would be the same direction, 0 nothing in common (cosine).',
  vocabulary: 'The size of the vocabulary',
  cut: 'Your text: {characters} characters, {bytes} bytes, {tokens} tokens: {ratio} characters a token, with a vocabulary of {size}.',
  larger: 'A larger vocabulary needs fewer tokens for the same text: DeepSeek LLM has 102,400, {name} {reference}. It pays with larger tables at both ends of the model. (Those tokenizers are not part of moescope; a DeepSeek model opened here shows its own cut.)',
};
