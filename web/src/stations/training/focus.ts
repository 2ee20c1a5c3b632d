/** What an expert's work is made of, domain by domain. */

/**
 * Share of each domain in one expert's work, every domain counted alike; null where it had none.
 * `load` is `[domain][layer][expert]`.
 */
export function mixOf(load: number[][][], layer: number, expert: number): number[] | null {
  const shares = load.map((layers) => layers[layer][expert]);
  const sum = shares.reduce((a, b) => a + b, 0);
  return sum > 0 ? shares.map((share) => share / sum) : null;
}

/** How much of its work an expert does for the domain that it serves most, on average over work. */
export function averageFocus(load: number[][][], layer: number): number {
  let focused = 0;
  let all = 0;
  for (let expert = 0; expert < load[0][layer].length; expert++) {
    const shares = load.map((layers) => layers[layer][expert]);
    focused += Math.max(...shares);
    all += shares.reduce((a, b) => a + b, 0);
  }
  return all > 0 ? focused / all : 0;
}
