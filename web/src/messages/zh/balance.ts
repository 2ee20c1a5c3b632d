import type en from '../en/balance';

const zh: typeof en = {
  title: '活儿分得匀吗？',
  sentence: '每位专家都该有活儿干，而且各有所长。',
};
export default zh;
