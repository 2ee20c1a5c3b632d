import type en from '../en/next';

const zh: typeof en = {
  title: '下一个是什么？',
  sentence: '模型给每个词元一个概率，再从中选出一个。',
};
export default zh;
