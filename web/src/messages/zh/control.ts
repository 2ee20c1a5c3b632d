import type en from '../en/control';

const zh: typeof en = {
  begin: '开始',
  end: '结束',
  User: '用户',
  Assistant: '助手',
};
export default zh;
