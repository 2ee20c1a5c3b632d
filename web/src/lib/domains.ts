/** The kinds of text that the model in the box was trained on, in the reader's words. */
import { t, type Key } from './i18n.svelte';

const KNOWN: Record<string, Key> = {
  poetry: 'experts.poetry',
  prose: 'experts.prose',
  code: 'experts.code',
  translation: 'experts.translation',
  arithmetic: 'experts.arithmetic',
  definitions: 'experts.definitions',
  documentation: 'experts.documentation',
  models: 'experts.models',
};

/** Okabe and Ito's colours, which stay apart for the colour-blind, then a grey and a brown. */
const COLORS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#8a8d94', '#8c5a2b'];

/** Another model's domains keep their own names. */
export const domainName = (domain: string) => (domain in KNOWN ? t(KNOWN[domain]) : domain);

export const domainColor = (index: number) => COLORS[Math.min(index, COLORS.length - 1)];
