/** Where components find the page's one state. */
import { getContext, setContext } from 'svelte';
import type { AppState } from './state.svelte';

const CONTEXT = Symbol('app');

export function setApp(app: AppState): AppState {
  return setContext(CONTEXT, app);
}

export function useApp(): AppState {
  return getContext<AppState>(CONTEXT);
}
