/** How a token is spelled for the eye. */
import type { TokenStep } from './types';

const REPLACEMENT = '\ufffd';

/** Spelling of a token: white space made visible where nothing else is. */
export function shown(text: string): string {
  const visible = text.replaceAll('\n', '↵').replaceAll('\t', '⇥');
  return /^ +$/.test(visible) ? visible.replaceAll(' ', '␣') : visible;
}

/** Spelling of a step; a piece of a character shows its bytes, a long control token its first word. */
export function spelling(step: TokenStep): string {
  const control = /^<｜([^▁｜]*).*｜>$/.exec(step.text);
  if (control) return `⟨${control[1]}⟩`;
  return step.text.includes(REPLACEMENT) && step.bytes.length > 0
    ? step.bytes.map(hex).join(' ')
    : shown(step.text);
}

/** The same for running text, without the spaces around it. */
export function quoted(step: TokenStep): string {
  return spelling(step).trim() || spelling(step);
}

/** At most `length` characters. */
export function clip(text: string, length: number): string {
  const characters = [...text];
  return characters.length > length ? characters.slice(0, length - 1).join('') + '…' : text;
}

export function hex(byte: number): string {
  return byte.toString(16).toUpperCase().padStart(2, '0');
}
