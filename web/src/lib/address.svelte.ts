/** The state and the page's address: each says what the other does. */
import { MAX_TOKENS } from './limits';
import type { AppState } from './state.svelte';
import { readUrl, writeUrl, type UrlState } from './url';

/** Milliseconds: browsers refuse more than some hundred changes of the address in half a minute. */
const SETTLED = 250;

export function addressOf(app: AppState): string {
  return writeUrl({
    prompt: app.shownPrompt ?? app.prompt,
    ids: app.steps.length > app.promptTokens ? app.ids : undefined,
    promptTokens: app.promptTokens,
    selected: app.selected,
    layer: app.layer,
    expert: app.selectedExpert ?? undefined,
    maxTokens: app.maxTokens,
    folded: app.folded,
    theme: app.theme,
    guessFirst: app.guessFirst,
    local: app.local,
    steering: app.steering,
    sampling: app.resampled,
    language: app.language,
  });
}

/** Take over what the address says, but for what needs the model first: that is given back. */
export function takeOver(app: AppState): UrlState {
  const wanted = readUrl(location.search);
  if (wanted.language) app.language = wanted.language;
  if (wanted.prompt) app.prompt = wanted.prompt;
  app.steering = wanted.steering;
  app.maxTokens = wanted.maxTokens ?? MAX_TOKENS;
  app.folded = wanted.folded;
  app.theme = wanted.theme ?? 'auto';
  app.guessFirst = wanted.guessFirst;
  app.local = wanted.local;
  return wanted;
}

/** An effect: keep the address as the state is. */
export function keepAddress(app: AppState): (() => void) | void {
  const url = addressOf(app);
  // Until its text is there, the address says more than the state.
  if (app.steps.length === 0) return;
  const timer = setTimeout(() => history.replaceState(null, '', url), SETTLED);
  return () => clearTimeout(timer);
}
