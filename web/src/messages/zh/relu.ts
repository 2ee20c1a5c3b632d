import type en from '../en/relu';

const zh: typeof en = {
  title: '能不能选得没有跳跃？',
  sentence: 'Softmax 加 top-k 每次请的人数固定；ReLU 路由（ReMoE）凡得分大于零的都请。',
  softmax: 'Softmax，取前几位',
  relu: 'ReLU',
  jump: 'Top-k：过了线，权重一下子从无到有。跳跃那边是什么，没有梯度告诉路由器。',
  bend: 'ReLU：权重从零平滑地长起来，梯度可以一路传到底；请几位，随词元而变。',
  counts: '你的文字里每个词元请了几位（第 {layer} 层，共 {total} 位）',
  row: '{rule}：{asked}',
  always: '每次都是 {n} 位',
  mean: '平均 {n} 位，从 {low} 到 {high} 位',
  note: '这个模型是按自己的规则训练的；这里只是看同样的得分换一种规则会请谁。用 ReLU 训练的模型，会用一项惩罚把平均人数压低。',
};
export default zh;
