import type en from '../en/tokens';

const zh: typeof en = {
  title: '模型读到的是什么？',
  sentence: '文字先切成词元，每个词元再变成一串数字。',
};
export default zh;
