import type en from '../en/attention';

const zh: typeof en = {
  title: '它回头看了谁？',
  sentence: '去见专家之前，这个词元先从前文里取来需要的信息。',
  heads: '注意力头',
  mean: '全部平均',
  head: '头 {n}',
  count: '{n} 个头',
  label: '“{text}”的注意力，{name}',
  cache: '每一层为每个词元要记住多少个数',
  cacheLabel: '潜在注意力的缓存记 {kept} 个数，完整缓存要记 {full} 个',
  full: '完整缓存',
  latent: '潜在注意力',
  picks: '索引器为这个词元挑出了能看的词元：{past} 个中的 {n} 个，其余的变淡。',
  entryPicks: '索引器为这个词元挑出了能看的条目：{past} 个中的 {n} 个，每个条目由 {tokens} 个词元压缩而成。',
  where: '注意力落在哪里',
  toTokens: '单个词元',
  toEntries: '{n} 个词元的压缩条目',
  toSinks: '哪儿都不看（学来的汇点）',
  grouped: '分组共用',
  groupedLabel: '几个头共用一组，缓存记 {kept} 个数，完整缓存要记 {full} 个',
  compressed: '这个模型只原样保留最近的词元，更早的压成共用的条目，所以说不出每个词元各占几个数。',
};
export default zh;
