import type en from '../en/training';

const zh: typeof en = {
  title: '这些是怎么学会的？',
  titleLive: '它此刻在学什么？',
  sentence: '损失往下走，专家渐渐分家：各自找到拿手的文字。',
  replay: '重放',
  pause: '暂停',
  scrub: '训练进度',
  step: '第 {step} 步',
  drift: '第 {layer} 层的专家平均把 {share} 的活花在自己最拿手的一类文字上（毫无偏好时是 {even}）。',
  columns: '每位专家一根柱，显示它处理哪几类文字',
  column: '每根柱对应一位专家，颜色是它处理的文字：',
  experts: '{n} 位',
  chart: '训练各步的损失与均衡',
  loss: '损失，每词元奈特（灰：训练中，彩：没见过的文字）',
  balance: '不均衡（蓝：各层平均，灰：每层）',
  reading: '第 {step} 步，共 {total} 步：损失 {loss}；最差的一层里，最忙的专家多出 {violation} 份。',
  none: '这个模型没有附带训练记录。',
  waiting: '正在等训练的第一步……',
  explain: '不均衡的数值，是最忙的专家比平均一份多出几份。各柱按训练结束时的次序排，好看出它们怎样各归各位。各类文字不论多少，权重相同。',
};
export default zh;
