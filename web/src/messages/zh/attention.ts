import type en from '../en/attention';

const zh: typeof en = {
  title: '它回头看了谁？',
  sentence: '见专家之前，这个词元先从前文里取来需要的信息。',
};
export default zh;
