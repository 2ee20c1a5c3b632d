import type en from '../en/training';

const zh: typeof en = {
  title: '这些是怎么学会的？',
  sentence: '回放它自己的训练：损失下降，专家逐渐分工。',
};
export default zh;
