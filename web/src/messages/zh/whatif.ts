import type en from '../en/whatif';

const zh: typeof en = {
  title: '少了一位专家会怎样？',
  sentence: '关掉或强制启用某位专家，对照两种续写。',
};
export default zh;
