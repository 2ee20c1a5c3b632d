/** Two languages, one catalogue: a key or a language that is missing breaks `npm run check`. */
import { en } from '../messages/en';
import { zh } from '../messages/zh';

export type Language = 'zh' | 'en';
type Catalogue = typeof en;
export type Key = {
  [Section in keyof Catalogue & string]: `${Section}.${keyof Catalogue[Section] & string}`;
}[keyof Catalogue & string];
type Values = Record<string, string | number>;

const catalogues: Record<Language, Catalogue> = { en, zh };

export const i18n = $state({ language: servedLanguage() });

/**
 * The message of a key, with `{name}` filled in; numbers are written as the language does.
 * `{name?one:many}` is the first word for 1 and else the second.
 */
export function t(key: Key, values: Values = {}): string {
  const [section, name] = key.split('.') as [keyof Catalogue, never];
  const message: string = catalogues[i18n.language][section][name];
  const said = message.replace(/\{(\w+)(?:\?([^:}]*):([^}]*))?\}/g, (_, field: string, one?: string, many?: string) => {
    const value = values[field];
    if (one !== undefined) return value === 1 ? one : many!;
    return typeof value === 'number' ? formatNumber(value) : String(value);
  });
  return said.replace(/([万亿]) (?=\p{Script=Han})/gu, '$1'); // 3000万个, not 3000万 个
}

/** A layer or a head as people count, from 1; addresses and requests count from 0, as the model's files do. */
export const nth = (layer: number): number => layer + 1;

/** Sentences one after the other; Chinese has no space between them. */
export const sentences = (...parts: (string | false | null)[]): string =>
  parts.filter(Boolean).join(i18n.language === 'zh' ? '' : ' ');

/** A number with at most `digits` decimals. */
export function formatNumber(value: number, digits = 2): string {
  return format({ maximumFractionDigits: digits }, value);
}

/** Shares below it are only said to be below. */
const LEAST_SHARE = 1e-4;

/** A share as per cent: two significant digits below 10 %, whole numbers above. */
export function formatPercent(share: number): string {
  if (share > 0 && share < LEAST_SHARE) return `< ${formatPercent(LEAST_SHARE)}`;
  const digits = share < 0.0995 ? { maximumSignificantDigits: 2 } : { maximumFractionDigits: 0 };
  return format({ style: 'percent', ...digits }, share);
}

/** A large count in few characters: 8.6M, 860万. */
export function formatCount(count: number): string {
  return format({ notation: 'compact', maximumSignificantDigits: 3 }, count);
}

/** Kept, because one takes a hundred times as long to make as to use. */
const formats = new Map<string, Intl.NumberFormat>();

function format(options: Intl.NumberFormatOptions, value: number): string {
  const locale = i18n.language === 'zh' ? 'zh-CN' : 'en';
  const name = locale + JSON.stringify(options);
  let made = formats.get(name);
  if (!made) formats.set(name, (made = new Intl.NumberFormat(locale, options)));
  return made.format(value);
}

/** The language that the server chose, by the address or by the browser's wish. */
function servedLanguage(): Language {
  return globalThis.document?.documentElement.lang.startsWith('zh') ? 'zh' : 'en';
}
