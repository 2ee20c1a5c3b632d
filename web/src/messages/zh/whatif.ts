import type en from '../en/whatif';

const zh: typeof en = {
  title: '少了一位专家会怎样？',
  sentence: '关掉几位专家，或强制请一位，再对照两种续写。',
  offer: '在你的文字上最忙的几位，点一下就关掉：',
  switchOff: 'L{layer} {expert}：关掉这位专家',
  others: '换一位，或强制请一位',
  changed: '改动：',
  off: '关掉',
  forced: '必请',
  undo: 'L{layer} {expert} {change}：撤销',
  write: '两边都续写',
  running: '正在写……',
  length: '续写几个词元',
  nothing: '还没有改动，所以两边一样。先在上面关掉一位专家。',
  parts: '写到第 {n} 个新词元时，两边分道扬镳。',
  same: '文字没变，只有概率动了。',
  at: '“{text}”之后会是什么',
  apart: '分开之后两边读的已不是同一段文字；请选分开之前的词元来比较。',
};
export default zh;
