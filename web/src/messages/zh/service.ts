import type en from '../en/service';

const zh: typeof en = {
  title: '部署起来有多快？要什么机器？',
  sentence: '为一位读者写一个词元，用到的参数都得从内存读一遍。快慢的上限就在这里。',
  table: '单段文字每秒最多几个词元（每个参数一个字节）',
  reads: '每个词元读的参数',
  laptop: '笔记本',
  server: '服务器处理器',
  gpu: '一块 H100',
  node: '八块 H200',
  denseTwin: '与 {name} 同样大的稠密模型',
  note: '只按内存带宽（厂商数据）估的上限。括号里的是装不下的：R1 的参数要占 671 GB。许多段文字一起算，读一遍大家用，所以线上服务的总速度高得多。在处理器上，oneDNN 这类库和 moescope 自己的内核负责让计算跟上这个上限。',
  offered: 'DeepSeek-R1 是开放的，许多平台拿它提供服务，如 NVIDIA NIM、Fireworks、Cerebras；快慢贵贱，看各家的机器。“moescope plan”可以按你的机器来算。',
};
export default zh;
