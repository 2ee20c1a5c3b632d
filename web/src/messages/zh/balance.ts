import type en from '../en/balance';

const zh: typeof en = {
  title: '活儿分得匀吗？',
  sentence: '每位专家都该有事做，又各有各拿手的文字。',
  text: '看哪种文字',
  own: '你的文字（{n} 个词元）',
  compare: '并排看：不用均衡偏置',
  asIs: '模型原样',
  withoutBias: '不用均衡偏置',
  map: '每位专家的负载；一行一层，一列一位专家',
  mapWithoutBias: '不用均衡偏置时每位专家的负载',
  axis: '专家 →（一行一层）',
  axisEnds: '行末：该层最忙的专家是平均的几倍',
  legend: '颜色：从空闲，到平均一份，到平均的 {most} 倍以上',
  even: '平均一份',
  read: '第 {layer} 层专家 {expert}：承担 {share}，是平均的 {times} 倍',
  facts: '{total} 位专家中有 {idle} 位没活干；最忙的是第 {layer} 层的专家 {expert}，是平均的 {busiest} 倍。',
  explain:
    '训练时，每一步之后，活太多的专家偏置降一点，活太少的升一点。偏置只动选择，不动权重，所以不必再加一项损失去干扰学习。短短一段文字填不满所有专家；各类文字的图是用多得多的文本测的。',
  information: '各层专家透露文字种类的信息量（比特）：',
};
export default zh;
