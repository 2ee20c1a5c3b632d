import type en from '../en/prompt';

const zh: typeof en = {
  title: '看混合专家模型怎么想',
  sentence: '写一句话，按下播放：模型接着往下写，下面每张图都是它此刻真实的计算。',
};
export default zh;
