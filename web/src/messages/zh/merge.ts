import type en from '../en/merge';

const zh: typeof en = {
  title: '几份回答怎样合成一份？',
  sentence: '每份回答先乘上权重，再全部加起来。',
  add: '已经加上几份',
  split: '总和的长度里，共享专家占 {shared}，路由专家占 {routed}',
  picture: '每位专家在总和里的一份，一条接着一条',
  who: '谁 × 权重',
  adds: '加上',
  shared: '共享',
  rest: '其余 {n} 位',
  output: '总和',
  sofar: '到此为止',
  note: '一条的长短，是这份回答把总和朝最终方向推了多远；虚线框是往回拉的。各条相加，正好是总和的长度。',
  residual: '总和再加到词元的向量上，送往下一层。各向量的长度：',
  residualBefore: '词元原来的向量',
  residualAdded: '加上的',
  residualAfter: '相加之后的向量',
  streams: '总和写进 {n} 条流',
  streamsNote: '这个模型里每个词元有好几条向量。每半层先把它们调和起来读，再写回每一条，并让它们互相掺和：平均每条流保留自身的 {kept}。',
  mixAttention: '注意力前后',
  mixExperts: '专家前后',
  new: '新 {n}',
  old: '旧 {n}',
  pre: '读',
  post: '写',
};
export default zh;
