import type en from '../en/dense';

const zh: typeof en = {
  title: '为什么不让所有人都干活？',
  sentence: '旁边放一个花费相同的稠密模型，读同一段文字。',
  race: '让两个模型都读这段文字',
  again: '再测一次',
  running: '两个都在读……',
  stale: '文字已经变了。',
  broken: '打不开稠密的对照模型：{problem}',
  none: '这个模型没有附带稠密的对照。',
  mixture: '混合专家',
  twin: '稠密对照',
  lit: '{total}个权重中，每个词元用到{active}个：{share}',
  unit: '一格是{n}个权重；亮的格子处理一个词元时用得到。',
  measures: '两者的花费与损失',
  flops: '一个词元的计算量（FLOPs）',
  bytes: '一个词元要从内存读的权重',
  time: '一个词元的用时（刚刚实测）',
  loss: '平均每个词元多意外（损失，nat，越小越好）',
  who: '{total} 个词元里，混合专家猜得更准的有 {n} 个',
  perToken: '每个词元谁猜得更准',
  leads: '条朝上：混合专家给这个词元的概率更高；朝下：稠密对照更高。越长差得越多。',
  next: '接下来各自会写什么',
  explain:
    '稠密对照的权重数，等于混合专家处理一个词元时动用的数目，用同样的文字训练了同样久。每个词元的计算量相同；混合专家装得下更多知识，代价是要更多内存来存放。',
};
export default zh;
