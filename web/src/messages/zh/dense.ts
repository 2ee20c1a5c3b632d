import type en from '../en/dense';

const zh: typeof en = {
  title: '为什么不全都用上？',
  sentence: '同样的文字，交给一个开销相同的稠密模型来比一比。',
};
export default zh;
