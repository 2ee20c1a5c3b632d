/** What was measured of the experts: who serves what, and how one calls them. */
import type { Language } from './i18n.svelte';
import { i18n } from './i18n.svelte';
import { isSame } from './steering';
import { shown } from './text';
import type { Card, ExpertId, SpecializationAnswer } from './types';

/** An expert is devoted to the kind of text that has most of its work, and more than so many even shares. */
const DEVOTED = 2;
/** Typical tokens that stand for an expert without a name. */
const TOKENS = 3;

export class Specialists {
  /** Null where nothing was measured. */
  measured: SpecializationAnswer | null = $state.raw(null);

  /** The layer whose experts differ most by the kind of text. */
  readable: number | null = $derived.by(() => {
    const bits = this.measured?.mutual_information ?? [];
    return this.measured?.layers[bits.indexOf(Math.max(...bits))] ?? null;
  });

  /** What was found out about an expert; null where nobody measured. */
  card(layer: number, expert: number): Card | null {
    const at = this.measured?.layers.indexOf(layer) ?? -1;
    return this.measured?.cards[at]?.[expert] ?? null;
  }

  /** An expert's name in the reader's language; null for most. */
  name(layer: number, expert: number): string | null {
    const language: Language = i18n.language;
    return this.card(layer, expert)?.[language] ?? null;
  }

  /** An expert's name, else its most typical tokens; null where nobody measured. */
  label(layer: number, expert: number): string | null {
    const tokens = this.card(layer, expert)?.tokens.slice(0, TOKENS) ?? [];
    const spelled = tokens.map((token) => shown(token).trim() || shown(token));
    return this.name(layer, expert) ?? (spelled.length > 0 ? spelled.join(' ') : null);
  }

  /** The share of an expert's work that a kind of text has if the expert is devoted to it. */
  devotion: number = $derived(DEVOTED / (this.measured?.domains.length ?? 1));

  /** The experts that are devoted to a kind of text. */
  devotedTo(domain: string): ExpertId[] {
    if (!this.measured) return [];
    const { domains, layers, cards } = this.measured;
    const wanted = domains.indexOf(domain);
    return layers.flatMap((layer, at) =>
      cards[at].flatMap((card, expert) =>
        card.domain === wanted && card.domain_share > this.devotion ? [{ layer, expert }] : [],
      ),
    );
  }

  /** The kind of text whose experts are exactly those; null where there is none. */
  domainOf(experts: ExpertId[]): string | null {
    const isExactly = (all: ExpertId[]) =>
      all.length === experts.length && all.every((id) => experts.some((other) => isSame(id, other)));
    const domains = experts.length > 0 ? (this.measured?.domains ?? []) : [];
    return domains.find((domain) => isExactly(this.devotedTo(domain))) ?? null;
  }
}
