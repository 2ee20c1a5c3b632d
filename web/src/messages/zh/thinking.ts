import type en from '../en/thinking';

const zh: typeof en = {
  title: '它会一步步算吗？',
  sentence: '给它一道算术题，它先写步骤，再写答案。',
  question: '一道算式',
  ask: '开始想',
  closer: '在每张图里细看这段文字',
  empty: '写一道算式，按“开始想”。',
  partQuestion: '题目',
  partThought: '思考',
  partAnswer: '答案',
  unfinished: '篇幅用完了，还没写到答案。',
  right: '答对了',
  wrong: '答错了，应是 {truth}',
  loads: '各部分由哪些专家经手（第 {layer} 层）',
  load: '专家 {expert}：经手了 {share} 的词元',
  words: 'write 是写下这一位，carry 是向前一位进。模型学步骤时用的就是这两个英文词。',
  unable: '这个模型不认得 <think> … </think>：没有学过把步骤和答案分开写。',
};
export default zh;
