/** The stations in the order of the page: a file and a line each. */
import type { Component } from 'svelte';
import type { Key } from '../lib/i18n.svelte';
import Attention from './Attention.svelte';
import Balance from './Balance.svelte';
import DenseMoe from './DenseMoe.svelte';
import Experts from './Experts.svelte';
import Flow from './Flow.svelte';
import Merge from './Merge.svelte';
import Next from './Next.svelte';
import Router from './Router.svelte';
import Summary from './Summary.svelte';
import Thinking from './Thinking.svelte';
import Tokens from './Tokens.svelte';
import Training from './Training.svelte';
import WhatIf from './WhatIf.svelte';

export interface StationEntry {
  name: string;
  title: Key;
  component: Component;
}

export const STATIONS: StationEntry[] = [
  { name: 'flow', title: 'flow.title', component: Flow },
  { name: 'tokens', title: 'tokens.title', component: Tokens },
  { name: 'attention', title: 'attention.title', component: Attention },
  { name: 'router', title: 'router.title', component: Router },
  { name: 'experts', title: 'experts.title', component: Experts },
  { name: 'merge', title: 'merge.title', component: Merge },
  { name: 'next', title: 'next.title', component: Next },
  { name: 'whatif', title: 'whatif.title', component: WhatIf },
  { name: 'balance', title: 'balance.title', component: Balance },
  { name: 'dense', title: 'dense.title', component: DenseMoe },
  { name: 'thinking', title: 'thinking.title', component: Thinking },
  { name: 'training', title: 'training.title', component: Training },
  { name: 'summary', title: 'summary.title', component: Summary },
];
