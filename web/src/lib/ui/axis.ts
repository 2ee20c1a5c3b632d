/** The probability at the end of an axis: round, and no further away than the longest bar needs. */
export function endOfAxis(probabilities: number[]): number {
  const longest = Math.max(0, ...probabilities);
  return [0.02, 0.05, 0.1, 0.2, 0.5].find((end) => end >= longest) ?? 1;
}
