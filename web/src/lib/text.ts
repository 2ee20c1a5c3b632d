/** How a token is spelled for the eye. */
import tokens from '../messages/en/control';
import { t, type Key } from './i18n.svelte';
import type { TokenStep } from './types';

const REPLACEMENT = '\ufffd';

/** Spelling of a token: white space made visible where nothing else is, control tokens short. */
export function shown(text: string): string {
  const visible = controlled(text).replaceAll('\n', '↵').replaceAll('\t', '⇥');
  return /^ +$/.test(visible) ? visible.replaceAll(' ', '␣') : visible;
}

/** Control tokens by their short names: `<｜begin▁of▁sentence｜>` reads `<begin>`. */
export function controlled(text: string): string {
  return text.replace(/<[｜|]▁?([^▁｜|]*)[^｜|]*[｜|]>/g, (_, name: string) => `<${inWords(name)}>`);
}

function inWords(name: string): string {
  return name in tokens ? t(`control.${name}` as Key) : name;
}

/** Spelling of a step; a piece of a character shows its bytes. */
export function spelling(step: Pick<TokenStep, 'text' | 'bytes'>): string {
  return step.text.includes(REPLACEMENT) && step.bytes.length > 0
    ? step.bytes.map(hex).join(' ')
    : shown(step.text);
}

/** The same for running text, without the spaces around it. */
export function quoted(step: TokenStep): string {
  return spelling(step).trim() || spelling(step);
}

/** At most `length` characters; a control token keeps its closing bracket. */
export function clip(text: string, length: number): string {
  const characters = [...text];
  if (characters.length <= length) return text;
  const end = /^<\/?[\p{L}\w]+>$/u.test(text) && length > 3 ? '…>' : '…';
  return characters.slice(0, length - end.length).join('') + end;
}

/** A text without control tokens, in one line. */
export function plain(text: string): string {
  return text.replace(/<[｜|].*?[｜|]>|<\/?think>/g, ' ').replace(/\s+/g, ' ').trim();
}

export function hex(byte: number): string {
  return byte.toString(16).toUpperCase().padStart(2, '0');
}
