import type en from '../en/flow';

const zh: typeof en = {
  title: '一个词元要走过哪些路？',
  sentence: '从读入一个词元，到选出下一个，全部过程都在这里。',
};
export default zh;
