import type en from '../en/context';

const zh: typeof en = {
  title: '能读多长的文字？',
  sentence: '每个词元都在缓存里留下一些数，供后面的词元回头看。潜在注意力留得少。',
  tokens: '文字长度',
  window: '（上下文 {n} 个词元）',
  capped: '超出了这个模型的上下文，所以按它最多的 {n} 个词元算。',
  full: '普通注意力',
  note: '按全部层、每个数两个字节计。这与专家无关，取决于用哪种注意力。',
};
export default zh;
