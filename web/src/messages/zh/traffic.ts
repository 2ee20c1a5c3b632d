import type en from '../en/traffic';

const zh: typeof en = {
  title: '这台服务器正在回答什么',
  sentence: '最近的请求，边答边列在这里。打开一个回答，下面每张图都会显示它是怎样算出来的。',
  empty: '还没有人提问。一有客户端来问，就会列在这里。',
  lost: '列表停住了。',
  state_waiting: '等待中',
  state_running: '生成中',
  state_ended: '已完成',
  state_cancelled: '已断开',
  state_failed: '出错了',
  tokens: '读了 {read} 个词元，写了 {made} 个',
  speed: '每秒 {n} 个',
  steered: '路由器有改动',
  nothingYet: '还没有写出内容',
  noText: '没有文字',
  open: '画成图',
  tooLong: '太长，画不成图',
  more: '另有 {n} 个回答',
  key: '服务器的密钥',
  keyWhy: '这台服务器启动时设了密钥。关掉这个标签页之前，网页会记住它。',
  keySend: '继续',
};
export default zh;
