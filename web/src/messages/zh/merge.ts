import type en from '../en/merge';

const zh: typeof en = {
  title: '多份意见怎样合成一份？',
  sentence: '每份输出乘上自己的权重，再加到一起。',
};
export default zh;
