import type en from '../en/reasoning';

const zh: typeof en = {
  title: '推理模型是怎么来的？',
  sentence: '它用强化学习学会了先写一长串思考，再给答案。',
  inferenceName: '推理（inference）',
  inference: '运行模型：每个词元穿过所有层一遍。任何模型都这样。',
  reasoningName: '推理（reasoning）',
  reasoning: '先一步步想，再作答。想的内容也是写出来的词元，所以想得越多，运行得越久。两个英文词，中文都叫“推理”。',
  path: 'DeepSeek-R1 走过的路',
  path1: '预训练：DeepSeek-V3 在 14.8 万亿个词元上学猜下一个。',
  path2: '冷启动：几千条长思考，让它先有个读得懂的样子。',
  path3: '强化学习（GRPO）：数学、代码、逻辑题各答许多遍，用规则判对错，让通向正确答案的写法更常出现。',
  path4: '从自己的思考里挑出好的，同别的文字一起再学一遍。',
  path5: '再做一轮强化学习，兼顾有用和无害。',
  lacks: '这里的模型只是像第 2 步那样从例子里学会写步骤，没有做过强化学习，所以没有那样的历程可以重放。',
  unknown: '这个模型没有附带训练记录，所以看不出它走过哪几步，也没有强化学习的历程可以重放。',
  compare: '同样的题，想和不想',
  attempt: '{n} 道算式各答两遍',
  direct: '直接回答',
  thought: '先写步骤',
  tokens: '写了 {n} 个词元',
};
export default zh;
