import type en from '../en/prompt';

const zh: typeof en = {
  title: '自己试试',
  sentence: '写一句话，按下播放。模型接着往下写，下面每张图都是它此刻真实的计算。',
  label: '你的文字',
  length: '续写词元数',
  examples: '例子',
  counter: '为这个词元动用的参数',
  of: '{used} / {total}',
  ended: '模型认为已经写完。按“单步”还可以接着写。',
  domain_poetry: '诗词',
  domain_prose: '散文小说',
  domain_code: '代码',
  domain_translation: '翻译',
  domain_arithmetic: '算术',
  domain_models: '关于模型',
};
export default zh;
