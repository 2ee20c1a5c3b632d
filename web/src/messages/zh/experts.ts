import type en from '../en/experts';

const zh: typeof en = {
  title: '专家们在做什么？',
  sentence: '这个词元只惊动少数几位专家；共享专家每次都在。',
};
export default zh;
