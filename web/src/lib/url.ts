/** The state in the address: short names, left out where nothing was changed. */
import type { Language } from './i18n.svelte';
import declared from './declared.json';
import { MAX_TOKENS, MOST_TOKENS } from './limits';
import { MAX_NOISE, NO_STEERING, RULES } from './steering';
import type { ExpertBias, ExpertId, SamplingRequest, SteeringRequest } from './types';

export type Theme = 'auto' | 'light' | 'dark';

/**
 * What a station alone cares about: the head of attention, whether experts are sorted, the kind of
 * text and the copy beside it in the balance, the length and the wish of a what-if, whether the
 * twin was asked, the sum to think about and whether it was asked, the snapshot of the training.
 */
export const LOCAL = [
  'head', 'sorted', 'kind', 'beside', 'whatif', 'length', 'dense', 'sum', 'think', 'snapshot',
] as const;
export type LocalName = (typeof LOCAL)[number];
export type Local = Partial<Record<LocalName, string | undefined>>;

export interface UrlState {
  prompt?: string | undefined;
  ids?: number[] | undefined;
  promptTokens?: number | undefined;
  selected?: number | undefined;
  layer?: number | undefined;
  expert?: number | undefined;
  maxTokens?: number | undefined;
  folded: string[];
  theme?: Theme | undefined;
  guessFirst: boolean;
  /** What single stations are set to, by the names in `LOCAL`. */
  local: Local;
  language?: Language | undefined;
  steering: SteeringRequest;
  /** What differs from the model's own. */
  sampling: Partial<SamplingRequest>;
}

const THEMES: Theme[] = ['auto', 'light', 'dark'];

/** Names of the fields of sampling in the address. */
const SAMPLING = {
  temperature: 'temperature',
  top_k: 'top-k',
  top_p: 'top-p',
  min_p: 'min-p',
  repetition_penalty: 'repetition',
  frequency_penalty: 'frequency',
  presence_penalty: 'presence',
  seed: 'seed',
} as const;
/** What they may be, as the server declares it; a seed may be any whole number from 0 on. */
const RANGES: Record<keyof SamplingRequest, Range> = {
  ...declared.sampling,
  seed: { least: 0, most: null, open: false, whole: true },
};
interface Range {
  least: number;
  most: number | null;
  /** Whether the least number itself is left out. */
  open: boolean;
  whole: boolean;
}
/** Stands for a rule that the model has and the reader switched off. */
const OFF = 'off';

export function writeUrl(state: UrlState): string {
  const query = new URLSearchParams();
  const set = (name: string, value: unknown, unchanged: unknown = undefined) => {
    if (value !== undefined && value !== null && value !== '' && value !== unchanged)
      query.set(name, String(value));
  };
  const { steering: s } = state;
  set('lang', state.language);
  set('prompt', state.prompt);
  if (state.ids) {
    set('ids', state.ids.join('.'));
    set('typed', state.promptTokens);
  }
  set('at', state.selected);
  set('layer', state.layer);
  set('expert', state.expert);
  set('max', state.maxTokens, MAX_TOKENS);
  set('fold', state.folded.join());
  set('theme', state.theme, 'auto');
  set('guess', state.guessFirst ? 1 : null);
  for (const name of LOCAL) set(name, state.local[name]);
  set('k', s.num_experts_per_tok);
  set('rule', s.rule);
  set('unbiased', s.without_bias ? 1 : null);
  set('noise', s.noise, 0);
  set('noise-seed', s.noise_seed, 0);
  set('bias', s.bias.map((b) => `${b.layer}:${b.expert}:${b.bias}`).join());
  set('off', s.disabled.map(expertName).join());
  set('force', s.forced.map(expertName).join());
  for (const [field, value] of Object.entries(state.sampling))
    set(SAMPLING[field as keyof typeof SAMPLING], value ?? OFF);
  return `${location.pathname}?${query}`;
}

/** Read an address; what makes no sense is taken as not said. */
export function readUrl(search: string): UrlState {
  const query = new URLSearchParams(search);
  const number = (name: string, low: number, high = Number.MAX_SAFE_INTEGER): number | null => {
    const value = Number(query.get(name) || NaN);
    return value >= low && value <= high ? value : null;
  };
  const integer = (name: string, low = 0, high?: number) => {
    const value = number(name, low, high);
    return value !== null && Number.isInteger(value) ? value : null;
  };
  const list = (name: string) => (query.get(name) ?? '').split(',').filter(Boolean);
  /** A field of sampling; null where it is off, undefined where nothing that makes sense is said. */
  const sampled = (field: keyof SamplingRequest): number | null | undefined => {
    const name = SAMPLING[field];
    if (query.get(name) === OFF) return null;
    const { least, most, open, whole } = RANGES[field];
    const value = (whole ? integer : number)(name, least, most ?? undefined);
    return value === null || (open && value === least) ? undefined : value;
  };
  const fields = Object.keys(SAMPLING) as (keyof SamplingRequest)[];
  const language = query.get('lang');
  const ids = (query.get('ids') ?? '').split('.').filter(Boolean).map(Number);
  return {
    language: language === 'zh' || language === 'en' ? language : undefined,
    prompt: query.get('prompt') ?? undefined,
    ids: ids.length > 0 && ids.every(isIndex) ? ids : undefined,
    promptTokens: integer('typed') ?? undefined,
    selected: integer('at') ?? undefined,
    layer: integer('layer') ?? undefined,
    expert: integer('expert') ?? undefined,
    maxTokens: integer('max', 1, MOST_TOKENS) ?? undefined,
    folded: list('fold'),
    theme: THEMES.find((theme) => theme === query.get('theme')),
    guessFirst: query.get('guess') === '1',
    local: Object.fromEntries(LOCAL.map((name) => [name, query.get(name) ?? undefined])),
    steering: {
      num_experts_per_tok: integer('k', 1),
      rule: RULES.find((rule) => rule === query.get('rule')) ?? null,
      without_bias: query.get('unbiased') === '1',
      noise: number('noise', 0, MAX_NOISE) ?? NO_STEERING.noise,
      noise_seed: integer('noise-seed') ?? NO_STEERING.noise_seed,
      bias: list('bias').flatMap(parseBias),
      disabled: list('off').flatMap(parseExpert),
      forced: list('force').flatMap(parseExpert),
    },
    sampling: Object.fromEntries(
      fields.map((field) => [field, sampled(field)]).filter(([, value]) => value !== undefined),
    ) as Partial<SamplingRequest>,
  };
}

const isIndex = (value: number) => Number.isInteger(value) && value >= 0;

const expertName = (id: ExpertId) => `${id.layer}:${id.expert}`;

function parseExpert(text: string): ExpertId[] {
  const [layer, expert, ...rest] = text.split(':').map(Number);
  return isIndex(layer) && isIndex(expert) && rest.length === 0
    ? [{ layer, expert }]
    : [];
}

function parseBias(text: string): ExpertBias[] {
  const cut = text.lastIndexOf(':');
  const bias = Number(text.slice(cut + 1));
  return Number.isFinite(bias)
    ? parseExpert(text.slice(0, cut)).map((id) => ({ ...id, bias }))
    : [];
}
