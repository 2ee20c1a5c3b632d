/** The stations in the order of the page: a file and a line each. */
import type { Key } from '../lib/i18n.svelte';

export interface StationEntry {
  name: string;
  title: Key;
  /** The component's, in this folder. */
  file: string;
}

export const STATIONS: StationEntry[] = [
  { name: 'language', title: 'language.title', file: 'Language' },
  { name: 'steps', title: 'steps.title', file: 'Steps' },
  { name: 'flow', title: 'flow.title', file: 'Flow' },
  { name: 'tokens', title: 'tokens.title', file: 'Tokens' },
  { name: 'attention', title: 'attention.title', file: 'Attention' },
  { name: 'context', title: 'context.title', file: 'Context' },
  { name: 'router', title: 'router.title', file: 'Router' },
  { name: 'relu', title: 'relu.title', file: 'Relu' },
  { name: 'experts', title: 'experts.title', file: 'Experts' },
  { name: 'fine', title: 'fine.title', file: 'Fine' },
  { name: 'merge', title: 'merge.title', file: 'Merge' },
  { name: 'next', title: 'next.title', file: 'Next' },
  { name: 'whatif', title: 'whatif.title', file: 'WhatIf' },
  { name: 'balance', title: 'balance.title', file: 'Balance' },
  { name: 'dense', title: 'dense.title', file: 'DenseMoe' },
  { name: 'thinking', title: 'thinking.title', file: 'Thinking' },
  { name: 'reasoning', title: 'reasoning.title', file: 'Reasoning' },
  { name: 'training', title: 'training.title', file: 'Training' },
  { name: 'service', title: 'service.title', file: 'Service' },
  { name: 'summary', title: 'summary.title', file: 'Summary' },
];
