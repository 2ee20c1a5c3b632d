import type en from '../en/fine';

const zh: typeof en = {
  title: '为什么要许多小专家？为什么要共享专家？',
  sentence: '把每位专家切成几份，多请几份：计算量不变，组合方式却多得多。',
  cut: '每位大专家切成几份',
  pieces: '{n} 份',
  withShared: '公共的部分交给一位共享专家',
  ways: '{n} 选 {k}：{ways} 种选法，计算量相同',
  picture: '{n} 位专家中 {k} 位亮着',
  commonWhy: '灰色是每位专家都得学的公共部分，比如语法：一份份重复存着。',
  sharedWhy: '共享专家每次都在，公共的部分由它学一遍就够；路由专家腾出来，专学各自的。',
  own: '{name} 是 {n} 选 {k}：{ways} 种选法。',
  explain: '这是 DeepSeekMoE 论文自己的例子（Dai 等，2024）：16 位专家选 {work} 位，各切成 4 份，就成了 64 选 8。亮着的面积是计算量，始终不变。',
};
export default zh;
