import type en from '../en/steps';

const zh: typeof en = {
  title: '文字是怎样一步步写出来的？',
  sentence: '自回归推理的五步，以选中的词元为例。',
  encode: '编码',
  encodeWhat: '文字变成词元编号，编号变成向量。',
  encodeLive: '{text} → 编号 {id} → {n} 个数',
  layers: '逐层计算',
  layersWhat: '依次穿过 {n} 层：回头看、请专家、相加。',
  layersDense: '依次穿过 {n} 层：回头看、过前馈网络、相加。',
  layersLive: '{n} 层，用到全部参数的 {share}',
  predict: '预测',
  predictWhat: '一次线性变换给词表里每个词元打分，softmax 把分数变成概率。',
  predictLive: '{n} 个分数，最高的是 {best}',
  pick: '选取',
  pickGreedy: '贪心：总选概率最高的。',
  pickDrawn: '采样：按温度和规则筛过之后掷骰子。',
  repeat: '重复',
  repeatWhat: '直到出现结束词元，或到达上限（最多 {max} 个词元）。',
  repeatLive: '已有 {n} 个词元，接着写第 {next} 个',
};
export default zh;
