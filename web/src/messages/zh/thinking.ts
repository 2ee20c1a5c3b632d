import type en from '../en/thinking';

const zh: typeof en = {
  title: '它会一步步算吗？',
  sentence: '遇到算术题，它先在 <think> 和 </think> 之间写出步骤。',
};
export default zh;
