/** Text that no model was trained on, since it was written for this page; one for each language. */
export const PASSAGES = {
  en: `The ferry was late, as it always was when the wind came from the north. An old man with a basket of apples sat on the pier and counted the gulls. When a boy asked him why, he said that nobody had ever told him to stop. They both laughed, and for a while they counted together, until the bell rang and the boat came out of the fog. "Forty-one," said the boy. "Forty-two," said the old man, "you forgot the one on my hat."`,
  zh: `《渡口》
北风一起，渡船就晚了。老人提着一篮苹果，坐在码头上数海鸥。孩子问他为什么数，他说从来没有人叫他停下。两人都笑了，便一同数下去。不久雾里传来钟声，船来了。孩子说：“四十一。”老人说：“四十二，你忘了我帽子上的那一只。”
江上秋风起，行人待渡迟。
白鸥飞又落，谁记几多时。`,
};
