import type en from '../en/router';

const zh: typeof en = {
  title: '该请哪些专家？',
  sentence: '路由器给每位专家打分，只请得分最高的几位。',
};
export default zh;
