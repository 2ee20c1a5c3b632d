import type en from '../en/language';

const zh: typeof en = {
  title: '什么是语言模型？',
  sentence: '一个反复猜“下一个词元是什么”的程序。写作、翻译、问答，都从这一件事里来。',
  tasks: '试一项任务：',
  write: '接着写',
  translate: '翻译',
  answer: '回答问题',
  picture: '文字穿过 {n} 层 Transformer，每层有注意力和前馈两部分，得出下一个词元',
  before: '已有的文字',
  beforeNote: '切成词元',
  transformer: 'Transformer：{n} 层',
  attention: '注意力：回头看',
  feed: '前馈网络',
  experts: '前馈：路由器和专家',
  after: '下一个词元',
  afterNote: '各有一个概率',
  inference: '推理（inference）就是使用模型：文字进，文字出，参数不变。本页做的就是这件事。',
  training: '训练在使用之前，比用一次贵得多：一步步改动参数，直到猜得准。',
  sparse: '稀疏激活：一个词元只激活入选的专家，没入选的不参与；注意力和共享专家每次都在。稠密模型则全部激活。',
  autoregressive: '自回归：每写出一个词元，它就成为猜下一个时所依据的文字。',
};
export default zh;
