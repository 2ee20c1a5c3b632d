import type en from '../en/errors';

const zh: typeof en = {
  context_full: '这段文字有 {n} 个词元，模型的上下文最多 {max} 个。请缩短一些。',
  text_too_long: '这段文字有 {n} 个字符，最多 {max} 个。请缩短一些。',
  prompt_empty: '先写几个字吧。',
  no_tokenizer: '这个模型没有附带分词器，读不了也写不了文字。',
  packed: '这些专家的权重为了算得快已经打包，取不出内部的数。不打包打开（moescope open … --backend torch）就能看。',
  no_specialization: '还没有人测过这些专家各自擅长什么；用“moescope specialize”可以测。',
  no_history: '这个模型没有附带训练记录。',
  no_dense: '这个模型没有附带同等计算量的稠密模型。',
  no_unbalanced: '这个模型没有附带训练时不做负载均衡的副本。',
  dense_broken: '打不开同等计算量的稠密模型：{problem}',
  unbalanced_broken: '打不开训练时不做负载均衡的副本：{problem}',
  no_key: '没有密钥，或者密钥不对。',
  answer_gone: '这个回答已经不在列表里了。',
  picture_too_long: '这段文字有 {n} 个词元，最多 {max} 个能画成图。',
  page_busy: '正在为其他访客生成文字，请稍后再试。',
  no_experts: '这个模型没有路由专家，所以没有路由器可改。',
  memory_full: '这段文字有 {n} 个词元，内存只放得下 {max} 个。请缩短一些。',
  unknown_token: '这个链接里有编号 {id} 的词元，而模型只认得 {n} 个；链接是用别的模型做的。',
  experts_asked: '要求每个词元请 {n} 位专家，而这里只能请 1 到 {max} 位。',
  dense_layer: '第 {layer} 层没有路由专家。',
  no_expert: '第 {layer} 层没有专家 {expert}，编号是 0 到 {last}。',
  all_disabled: '第 {layer} 层的 {n} 位专家全关掉了，至少要留一位。',
  off_and_forced: '第 {layer} 层专家 {expert} 既被关掉又被强制启用，只能选一样。',
};
export default zh;
