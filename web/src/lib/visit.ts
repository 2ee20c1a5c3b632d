/** Milliseconds within which a visit to a station ends. */
const ARRIVED = 3000;

/** Bring a station into view. */
export function visitStation(name: string): void {
  const smooth = !matchMedia('(prefers-reduced-motion: reduce)').matches;
  const element = document.getElementById(`station-${name}`);
  element?.scrollIntoView({ behavior: smooth ? 'smooth' : 'auto', block: 'start' });
  // Stations that come into sight on the way may grow and push this one down.
  const late = performance.now() + ARRIVED;
  const arrive = () => performance.now() < late && element?.scrollIntoView({ block: 'start' });
  if (smooth) addEventListener('scrollend', arrive, { once: true });
  element?.querySelector<HTMLElement>('h2')?.focus({ preventScroll: true });
}
