/** The page's one state: what was typed, what the model answered, and what the reader chose. */
import { untrack } from 'svelte';
import { keepAddress, takeOver } from './address.svelte';
import { answered, ApiError, getModel, getStart, isAbort, knock, serverGone, trace } from './api';
import { setApp } from './context';
import { Details } from './details.svelte';
import { i18n, t, type Language } from './i18n.svelte';
import { Latest } from './latest';
import { MAX_TEXT, MAX_TOKENS } from './limits';
import { playBack } from './playback';
import { Specialists } from './specialists.svelte';
import { isSteered, NO_STEERING, toggled } from './steering';
import type {
  CompanionInfo,
  End,
  GenerateRequest,
  ModelInfo,
  SamplingRequest,
  SteeringRequest,
  TokenDetail,
  TokenStep,
  WatchedAnswer,
} from './types';
import type { Local, LocalName, Theme } from './url';
import { visitStation } from './visit';

export type Status = 'idle' | 'loading' | 'playing' | 'paused' | 'ended' | 'error';

/** Milliseconds without a further change before all tokens are traced again. */
const SETTLED = 60;

/** Missing while the first screen is rendered at build time. */
const darkQuery = globalThis.matchMedia?.('(prefers-color-scheme: dark)');

export class AppState {
  model: ModelInfo | null = $state.raw(null);
  specialists = new Specialists();
  /** What the first screen asks for. */
  hero: GenerateRequest | null = $state.raw(null);
  theme: Theme = $state('auto');
  /** Stations that stand on the page; they come one after the other. */
  stations: number = $state(0);

  prompt: string = $state('');
  steps: TokenStep[] = $state.raw([]);
  promptTokens: number = $state(0);
  status: Status = $state('idle');
  error: string | null = $state(null);

  selected: number = $state(0);
  layer: number = $state(0);
  selectedExpert: number | null = $state(null);

  steering: SteeringRequest = $state.raw(NO_STEERING);
  /** What the reader changed about the model's own sampling. */
  resampled: Partial<SamplingRequest> = $state.raw({});
  maxTokens: number = $state(MAX_TOKENS);
  guessFirst: boolean = $state(false);
  /** The token that the reader bet on in "guess first"; null until then. */
  bet: number | null = $state(null);

  /** Stations that the reader folded. */
  folded: string[] = $state.raw([]);
  /** What single stations are set to; it stands in the address, too. */
  local: Local = $state.raw({});

  /** Whether all stations count as in sight, because the whole page is wanted. */
  whole: boolean = $state(false);

  /** Whether the server wants a key that the page does not have. */
  locked: boolean = $state(false);
  /** Counts the server's returns; effects that read it ask again for what they missed. */
  returns: number = $state(0);
  #prefersDark: boolean = $state(darkQuery?.matches ?? false);
  /** The text that `steps` began with; differs from `prompt` while the reader edits. */
  shownPrompt: string | null = null;
  /** The steering that `steps` were computed under. */
  #traced: SteeringRequest = NO_STEERING;
  #run: AbortController | null = null;
  #traces = new Latest();
  #lastIds: number[] = [];

  /** The same array as long as the tokens are the same, whatever else is known of them. */
  ids: number[] = $derived.by(() => {
    const ids = this.steps.map((step) => step.id);
    const same = ids.length === this.#lastIds.length && ids.every((id, i) => id === this.#lastIds[i]);
    return same ? this.#lastIds : (this.#lastIds = ids);
  });
  /** The selected token. */
  current: TokenStep | null = $derived(this.steps[this.selected] ?? null);
  /** The model's name without the folders that lead to it. */
  modelName: string = $derived(this.model?.name.split(/[\\/]/).at(-1)?.replace(/\.gguf$/i, '') ?? '');
  moeLayers: number[] = $derived(
    (this.model?.layers ?? []).flatMap((layer, index) => (layer.kind === 'moe' ? [index] : [])),
  );
  /** The chosen layer, or the mixture-of-experts layer nearest to it. */
  moeLayer: number = $derived(
    this.moeLayers.reduce(
      (best, index) =>
        Math.abs(index - this.layer) < Math.abs(best - this.layer) ? index : best,
      this.moeLayers[0] ?? 0,
    ),
  );
  /** The layer whose experts differ most by the kind of text, or the middle one. */
  readable: number = $derived(
    this.specialists.readable ?? this.moeLayers[Math.floor(this.moeLayers.length / 2)] ?? 0,
  );
  steered: boolean = $derived(isSteered(this.steering));
  dark: boolean = $derived(this.theme === 'auto' ? this.#prefersDark : this.theme === 'dark');
  /** Whether the guesses at what follows the selected token are to stay covered. */
  covered: boolean = $derived(
    this.guessFirst && this.bet === null && this.selected === this.steps.length - 1,
  );

  /** How tokens are picked; nothing is known of it before the model is. */
  sampling = $derived({ ...this.model?.sampling, ...this.resampled } as SamplingRequest);

  #details = new Details(this);

  /** The selected token in the chosen layer. */
  get detail(): TokenDetail | null {
    return this.#details.now;
  }

  /** The same without steering; null while there is none. */
  get baseline(): TokenDetail | null {
    return this.#details.before;
  }

  /** Token and layer that `detail` is of: it lags behind the choice by one answer. */
  get detailAt(): { index: number; layer: number } | null {
    return this.#details.at;
  }

  get language(): Language {
    return i18n.language;
  }

  set language(language: Language) {
    i18n.language = language;
  }

  constructor() {
    darkQuery?.addEventListener('change', (event) => (this.#prefersDark = event.matches));
    $effect(() => {
      document.documentElement.lang = i18n.language === 'zh' ? 'zh-CN' : 'en';
      document.documentElement.dataset.theme = this.theme;
    });
    $effect(() => this.#followSteering());
    $effect(() => keepAddress(this));
  }

  // --- what the reader does ----------------------------------------------------------------------

  /** Ask for the model and show what the address says, or an example. */
  async start(): Promise<void> {
    knock();
    this.status = 'loading';
    this.error = null;
    const wanted = takeOver(this);
    await this.guard(async () => {
      // Known before the model is shown: from then on the reader may play, which nothing may overtake.
      const { model, specialization, prompt, steps, hero } = await getStart(i18n.language);
      this.specialists.measured = specialization;
      this.locked = false;
      this.model = model;
      this.hero = hero;
      this.setSampling(wanted.sampling);
      this.setLayer(wanted.layer ?? this.readable);
      this.selectedExpert = wanted.expert ?? null;
      this.prompt ||= this.#firstExample();
      if (this.prompt === prompt && !wanted.ids && !this.steered) this.#display(prompt, steps);
      else await this.#show(this.prompt, wanted.ids, wanted.promptTokens);
      this.select(wanted.selected ?? this.steps.length - 1);
    });
  }

  /** After a failure: see whether the server is back, and ask for what was missed. */
  async retry(): Promise<void> {
    if (!this.model || this.steps.length === 0) return this.start();
    const gone = serverGone();
    knock();
    this.error = null;
    if (this.status === 'error') this.status = 'paused';
    if (!gone) return;
    await this.guard(async () => {
      await getModel();
      this.returns += 1;
    });
  }

  /** Continue the text, from the prompt if it was edited. */
  async play(): Promise<void> {
    await this.#continue(this.maxTokens);
  }

  /** Make one more token. */
  async step(): Promise<void> {
    await this.#continue(1);
  }

  /** Take the last made token back. */
  back(): void {
    this.pause();
    if (this.steps.length <= this.promptTokens) return;
    this.steps = this.steps.slice(0, -1);
    this.status = 'paused';
    this.select(this.steps.length - 1);
  }

  pause(): void {
    this.#run?.abort();
    this.#run = null;
    if (this.status === 'playing' || this.status === 'loading') this.status = 'paused';
  }

  /** Back to the prompt alone, as it is written now. */
  async reset(): Promise<void> {
    this.pause();
    await this.guard(() => this.#show(this.prompt));
    this.select(this.steps.length - 1);
  }

  /** Let the text go on with `id` after the selected token, whatever the model would pick. */
  async take(id: number): Promise<void> {
    const kept = this.ids.slice(0, this.selected + 1);
    const typed = Math.min(this.promptTokens, kept.length);
    await this.load(this.shownPrompt ?? this.prompt, [...kept, id], typed);
  }

  /** Show an answer that somebody was given, under the routers that it was made with. */
  async open(ask: () => Promise<WatchedAnswer>): Promise<void> {
    this.pause();
    await this.guard(async () => {
      const { prompt, ids, prompt_tokens, steering } = await ask();
      this.steering = isSteered(steering) ? steering : NO_STEERING;
      this.prompt = prompt;
      await this.#show(prompt, ids, prompt_tokens);
      this.select(this.steps.length - 1);
    });
  }

  /** Show exactly these tokens, the first `promptTokens` of them as the reader's. */
  async load(prompt: string, ids: number[], promptTokens: number): Promise<void> {
    this.pause();
    this.prompt = prompt;
    await this.guard(() => this.#show(prompt, ids, promptTokens));
    this.select(this.steps.length - 1);
  }

  select(index: number): void {
    this.selected = Math.max(0, Math.min(index, this.steps.length - 1));
    this.bet = null;
  }

  setLayer(layer: number): void {
    this.layer = Math.max(0, Math.min(layer, (this.model?.layers.length ?? 1) - 1));
    this.selectedExpert = null;
  }

  toggleDisabled(layer: number, expert: number): void {
    this.setSteering({ disabled: toggled(this.steering.disabled, { layer, expert }) });
  }

  /** Change the router; the text's tokens stay, what they meet is computed again. */
  setSteering(change: Partial<SteeringRequest>): void {
    this.steering = { ...this.steering, ...change };
    this.pause();
  }

  clearSteering(): void {
    this.setSteering(NO_STEERING);
  }

  setSampling(change: Partial<SamplingRequest>): void {
    const own = this.model?.sampling;
    const all = Object.entries({ ...this.resampled, ...change });
    this.resampled = Object.fromEntries(
      all.filter(([name, value]) => value !== own?.[name as keyof SamplingRequest]),
    );
  }

  /** The model beside this one in a role; null where there is none. */
  companion(role: CompanionInfo['role']): CompanionInfo | null {
    return this.model?.companions.find((companion) => companion.role === role) ?? null;
  }

  /** Set what a station alone cares about; null is as it was at first. */
  keep(name: LocalName, value: string | number | null): void {
    this.local = { ...this.local, [name]: value === null ? undefined : String(value) };
  }

  /** The whole number that a station was set to; null where it was set to none that makes sense. */
  kept(name: LocalName, least: number, most = Infinity): number | null {
    const value = Number(this.local[name] ?? NaN);
    return Number.isInteger(value) && value >= least && value <= most ? value : null;
  }

  fold(station: string, folded: boolean): void {
    this.folded = this.folded.filter((name) => name !== station).concat(folded ? [station] : []);
  }

  /** Open a station and bring it into view. */
  visit(station: string): void {
    this.fold(station, false);
    visitStation(station);
  }

  // --- talking to the server ---------------------------------------------------------------------

  /** Trace a prompt, or exactly `ids`, and show that. */
  async #show(prompt: string, ids?: number[], promptTokens?: number): Promise<void> {
    if (!ids) this.#checkPrompt();
    const run = this.#newRun();
    this.status = 'loading';
    const { steering } = this;
    const text = ids ? { ids } : { prompt: prompt.toWellFormed() };
    const { steps } = await trace({ ...text, steering }, run.signal);
    this.#traced = steering;
    this.#display(prompt, steps, promptTokens);
  }

  /** Show a text, the first `promptTokens` of it as the reader's. */
  #display(prompt: string, steps: TokenStep[], promptTokens = steps.length): void {
    this.shownPrompt = prompt;
    this.promptTokens = promptTokens;
    this.steps = steps.map((step) => ({ ...step, in_prompt: step.index < this.promptTokens }));
    this.status = 'paused';
  }

  async #continue(maxTokens: number): Promise<void> {
    await this.guard(async () => {
      const fresh = this.steps.length === 0 || this.prompt !== this.shownPrompt;
      if (fresh) this.#checkPrompt();
      else if (this.steering !== this.#traced) await this.#retrace();
      const run = this.#newRun();
      this.#traced = this.steering;
      this.status = 'playing';
        this.select(this.steps.length - 1);
      const { prompt, sampling, steering } = this;
      const text = fresh
        ? { prompt: prompt.toWellFormed() }
        : { ids: this.ids, known: this.ids.length };
      await playBack(
        { ...text, max_tokens: maxTokens, sampling, steering },
        {
          listening: () => run === this.#run,
          onToken: (step, inPrompt) => {
            if (step.index === 0) this.#clear(prompt);
            this.#append({ ...step, in_prompt: inPrompt });
          },
          onEnd: (end) => this.#end(end),
        },
        run.signal,
      );
    });
  }

  /** Make room for a new text, once its first token is there. */
  #clear(prompt: string): void {
    this.steps = [];
    this.promptTokens = 0;
    this.shownPrompt = prompt;
    this.selected = 0;
  }

  #append(step: TokenStep): void {
    const following = this.selected >= this.steps.length - 1;
    this.steps = [...this.steps, step];
    if (step.in_prompt) this.promptTokens = this.steps.length;
    if (following) this.select(this.steps.length - 1);
  }

  #end({ finish_reason }: End): void {
    // After the end token nothing is left to explain: the reader looks at the last word.
    const atEnd = finish_reason === 'stop' && this.selected === this.steps.length - 1;
    if (atEnd && this.steps.at(-1)?.special) this.select(this.steps.length - 2);
    this.status = finish_reason === 'stop' ? 'ended' : 'paused';
    this.#run = null;
  }

  /** The same tokens under the steering of now. */
  async #retrace(): Promise<void> {
    const { ids, promptTokens, steering } = this;
    const run = this.#newRun();
    const { steps } = await trace({ ids, steering }, run.signal);
    this.#traced = steering;
    this.steps = steps.map((step) => ({ ...step, in_prompt: step.index < promptTokens }));
  }

  /** Once the steering has settled, all tokens are traced; the selected one's details come first. */
  #followSteering(): (() => void) | void {
    const { steering } = this;
    void this.returns;
    const overtaken = () => steering === this.#traced || this.steps.length === 0;
    if (untrack(overtaken)) return;
    const retrace = () => (overtaken() ? Promise.resolve() : this.guard(() => this.#retrace()));
    const timer = setTimeout(() => void this.#traces.ask(retrace), SETTLED);
    return () => clearTimeout(timer);
  }

  /** What the reader asks for; it ends what was asked before. */
  #newRun(): AbortController {
    this.#run?.abort();
    knock();
    this.error = null;
    return (this.#run = new AbortController());
  }

  #checkPrompt(): void {
    if (!this.prompt.trim()) throw new ApiError(t('common.empty'));
    if ([...this.prompt].length > MAX_TEXT)
      throw new ApiError(t('common.tooLong', { n: [...this.prompt].length, max: MAX_TEXT }));
  }

  /** Do what may fail; what went wrong is told to the reader. */
  async guard(task: () => Promise<void>): Promise<void> {
    try {
      await task();
    } catch (error) {
      if (isAbort(error)) return;
      if (!(error instanceof ApiError)) throw error;
      this.locked = error.code === 'no_key';
      this.error = this.locked ? null : error.message;
      this.status = this.locked ? 'idle' : 'error';
      this.#run = null;
    }
  }

  /** Have all stations ask for what they ask for in sight, and do something when it is there. */
  async withAll(task: () => void): Promise<void> {
    this.whole = true;
    try {
      await answered();
      task();
    } finally {
      this.whole = false;
    }
  }

  #firstExample(): string {
    const examples = this.model?.examples ?? [];
    return (examples.find((e) => e.language === this.language) ?? examples[0])?.text ?? '';
  }
}

export function provideApp(): AppState {
  return setApp(new AppState());
}
