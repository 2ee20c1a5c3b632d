/** How work spreads over experts; loads are in times an even share, `[layer][expert]`. */
import type { TokenStep } from '../../lib/types';

/** Beyond so many times an even share an expert counts as overloaded. */
export const OVERLOADED = 2;

/** Loads of the layers with the given numbers of routed experts, over a text. */
export function loadsOf(steps: TokenStep[], layers: { index: number; experts: number }[]): number[][] {
  return layers.map(({ index, experts }) => {
    const counts = new Array<number>(experts).fill(0);
    let slots = 0;
    for (const step of steps)
      for (const id of step.layers[index]?.topk_ids ?? []) {
        counts[id] += 1;
        slots += 1;
      }
    return counts.map((count) => (slots > 0 ? (count * experts) / slots : 0));
  });
}

/** Shares of a layer's slots as times an even share. */
export const timesEven = (shares: number[][]): number[][] =>
  shares.map((layer) => layer.map((share) => share * layer.length));

/** The busiest expert's surplus over an even share ("MaxVio"), layer by layer. */
export const maxViolation = (loads: number[][]): number[] =>
  loads.map((layer) => Math.max(0, ...layer) - 1);

export const mean = (values: number[]): number =>
  values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);

/** The largest load of several maps, so that one scale fits all. */
export const largest = (...maps: number[][][]): number =>
  Math.max(OVERLOADED, ...maps.flat(1).map((layer) => Math.max(0, ...layer)));
