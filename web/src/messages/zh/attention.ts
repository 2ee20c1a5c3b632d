import type en from '../en/attention';

const zh: typeof en = {
  title: '它回头看了谁？',
  sentence: '去见专家之前，这个词元先从前文里取来需要的信息。',
  heads: '谁的视角',
  mean: '各头平均',
  head: '头 {n}',
  count: '{n} 个头',
  label: '“{text}”的注意力，{name}',
  cache: '每一层为每个词元要记住多少个数',
  cacheLabel: '潜在注意力的缓存记 {kept} 个数，完整缓存要记 {full} 个',
  full: '完整缓存',
  latent: '潜在注意力',
};
export default zh;
