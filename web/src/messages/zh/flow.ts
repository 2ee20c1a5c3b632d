import type en from '../en/flow';

const zh: typeof en = {
  title: '一个词元会经历什么？',
  sentence: '顺着线看：词元穿过每一层，最后模型猜出下一个。',
  walk: '跟它走过每一层',
  stop: '停下',
  layerOf: '第 {layer} 层，共 {last} 层',
  tokens: '词元',
  embedding: '向量',
  attention: '注意力：回头看',
  experts: '路由器与专家',
  dense: '前馈网络',
  denseLine1: '稠密层',
  denseLine2: '没有路由器，全部参与',
  router: '路由器',
  shared: '共享专家',
  guess: '下一个词元',
  again: '选中的词元接到文末，再来一遍',
  adds: '+ 处把结果加回向量',
  leads: '首选专家',
  wouldSay: '此时会说',
  layerSays: '第 {layer} 层，此时会说 {text}',
  table: '固定表',
  weight: '权重 {weight}',
  chosen: '入选的专家',
};
export default zh;
