/** The selected token in the chosen layer, taken apart by the server: as it is steered, and as it is. */
import { token } from './api';
import { Latest } from './latest';
import type { AppState } from './state.svelte';
import { isSteered } from './steering';
import type { TokenDetail } from './types';

/** Details without steering that are kept to compare with. */
const KEPT = 8;

export class Details {
  now: TokenDetail | null = $state.raw(null);
  /** The same without steering. */
  before: TokenDetail | null = $state.raw(null);
  /** Token and layer that `now` is of: it lags behind the choice by one answer. */
  at: { index: number; layer: number } | null = $state.raw(null);

  #app: AppState;
  #asked = new Latest();
  #askedBefore = new Latest();
  /** Details of the model as it is, by what was asked. */
  #plain = new Map<string, TokenDetail>();

  constructor(app: AppState) {
    this.#app = app;
    $effect(() => this.#fetch());
    $effect(() => this.#fetchBefore());
  }

  #fetch(): (() => void) | void {
    const request = this.#request();
    const { steering } = this.#app;
    if (!request) {
      this.now = this.at = null;
      return;
    }
    return this.#ask(this.#asked, async () => {
      const detail = await token({ ...request, steering });
      const { index, layer } = request;
      if (this.#app.ids[index] !== request.ids[index]) return; // meanwhile another text
      this.now = detail;
      this.at = { index, layer };
      if (!isSteered(steering)) this.#keep(JSON.stringify(request), detail);
    });
  }

  #fetchBefore(): (() => void) | void {
    const request = this.#app.steered ? this.#request() : null;
    const key = JSON.stringify(request);
    const known = this.#plain.get(key) ?? null;
    if (!request || known) {
      this.before = known;
      return;
    }
    return this.#ask(this.#askedBefore, async () => {
      const before = await token(request);
      this.#keep(key, before);
      if (this.#app.steered) this.before = before;
    });
  }

  #request() {
    const { ids, selected: index, layer, sampling, model } = this.#app;
    void this.#app.returns;
    return model && index < ids.length ? { ids, index, layer, sampling } : null;
  }

  #keep(key: string, detail: TokenDetail): void {
    this.#plain.set(key, detail);
    for (const oldest of this.#plain.keys()) if (this.#plain.size > KEPT) this.#plain.delete(oldest);
  }

  /** Ask at once, or when the last answer is there; the effect's end calls it off. */
  #ask(queue: Latest, task: () => Promise<void>): () => void {
    void queue.ask(() => this.#app.guard(task));
    return () => queue.drop();
  }
}
