/** The sum that the first screen works on, read and continued by the model itself. */
import { ApiError, generate, isAbort, trace } from '../lib/api';
import { NO_STEERING } from '../lib/steering';
import type { AppState } from '../lib/state.svelte';
import type { TokenStep } from '../lib/types';

/** Milliseconds of each part of a token's way: read, score, compute, merge. */
const PHASE = 520;
export const PHASES = 4;

export class Live {
  /** The text as the model computes it, with its own number of experts. */
  few: TokenStep[] = $state.raw([]);
  /** The same tokens with every expert asked; empty until somebody wants that. */
  all: TokenStep[] = $state.raw([]);
  everybody: boolean = $state(false);
  at: number = $state(0);
  phase: number = $state(0);
  moving: boolean = $state(true);
  #app: AppState;

  steps: TokenStep[] = $derived(this.everybody && this.all.length > 0 ? this.all : this.few);
  current: TokenStep | null = $derived(this.steps[this.at] ?? null);
  /** What comes next in the text; the likeliest guess at its end. */
  next: { text: string; probability: number } | null = $derived.by(() => {
    const { current } = this;
    if (!current) return null;
    const following = this.few[this.at + 1];
    const found = current.candidates.find(({ id }) => id === following?.id);
    return found ?? current.candidates[0] ?? null;
  });

  constructor(app: AppState) {
    this.#app = app;
    this.moving = !globalThis.matchMedia?.('(prefers-reduced-motion: reduce)').matches;
  }

  /** Read and continue the text. */
  async start(signal: AbortSignal): Promise<void> {
    await quietly(async () => {
      const steps: TokenStep[] = [];
      await generate(
        this.#app.hero!,
        (event) => {
          if (event.type !== 'token') return;
          steps.push(event.step);
          this.few = [...steps];
          const { step } = event;
          if (this.at === 0 && !step.special) this.at = step.index;
        },
        signal,
      );
    });
  }

  /** Ask as many experts as the model does, or all there are. */
  async toggle(): Promise<void> {
    this.everybody = !this.everybody;
    if (!this.everybody || this.all.length === this.few.length) return;
    const n = Math.max(...(this.#app.model?.layers ?? []).map((layer) => layer.n_routed_experts));
    await quietly(async () => {
      const ids = this.few.map((step) => step.id);
      const answer = await trace({ ids, steering: { ...NO_STEERING, num_experts_per_tok: n } });
      this.all = answer.steps;
    });
  }

  /** Move the token on by itself, until the returned function is called. */
  run(): () => void {
    const timer = setInterval(() => this.#tick(), PHASE);
    return () => clearInterval(timer);
  }

  #tick(): void {
    if (!this.moving || this.few.length === 0) return;
    if (this.phase < PHASES - 1) this.phase += 1;
    else {
      this.phase = 0;
      this.at = this.#following(this.at);
    }
  }

  /** The next token that spells something; from the last on to the first. */
  #following(at: number): number {
    for (let step = 1; step <= this.few.length; step++) {
      const next = (at + step) % this.few.length;
      if (!this.few[next].special) return next;
    }
    return at;
  }
}

/** The first screen goes without what the server cannot say; the page below tells why. */
async function quietly(task: () => Promise<void>): Promise<void> {
  try {
    await task();
  } catch (error) {
    if (!isAbort(error) && !(error instanceof ApiError)) throw error;
  }
}
