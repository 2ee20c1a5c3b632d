/** Control tokens, by their short names. */
export default {
  begin: 'begin',
  end: 'end',
  User: 'User',
  Assistant: 'Assistant',
};
