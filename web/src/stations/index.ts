/** The stations in the order of the page: a file and a line each. */
import type { Component } from 'svelte';
import type { Key } from '../lib/i18n.svelte';
import Attention from './Attention.svelte';
import Balance from './Balance.svelte';
import Context from './Context.svelte';
import DenseMoe from './DenseMoe.svelte';
import Experts from './Experts.svelte';
import Fine from './Fine.svelte';
import Flow from './Flow.svelte';
import Language from './Language.svelte';
import Merge from './Merge.svelte';
import Next from './Next.svelte';
import Reasoning from './Reasoning.svelte';
import Relu from './Relu.svelte';
import Router from './Router.svelte';
import Service from './Service.svelte';
import Steps from './Steps.svelte';
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
  { name: 'language', title: 'language.title', component: Language },
  { name: 'steps', title: 'steps.title', component: Steps },
  { name: 'flow', title: 'flow.title', component: Flow },
  { name: 'tokens', title: 'tokens.title', component: Tokens },
  { name: 'attention', title: 'attention.title', component: Attention },
  { name: 'context', title: 'context.title', component: Context },
  { name: 'router', title: 'router.title', component: Router },
  { name: 'relu', title: 'relu.title', component: Relu },
  { name: 'experts', title: 'experts.title', component: Experts },
  { name: 'fine', title: 'fine.title', component: Fine },
  { name: 'merge', title: 'merge.title', component: Merge },
  { name: 'next', title: 'next.title', component: Next },
  { name: 'whatif', title: 'whatif.title', component: WhatIf },
  { name: 'balance', title: 'balance.title', component: Balance },
  { name: 'dense', title: 'dense.title', component: DenseMoe },
  { name: 'thinking', title: 'thinking.title', component: Thinking },
  { name: 'reasoning', title: 'reasoning.title', component: Reasoning },
  { name: 'training', title: 'training.title', component: Training },
  { name: 'service', title: 'service.title', component: Service },
  { name: 'summary', title: 'summary.title', component: Summary },
];
