/**
 * The app as a station sees it that may be out of sight.
 *
 * While text is played, every token changes all pictures; drawing those that nobody sees would cost
 * the visible ones their frames. A station out of sight therefore keeps the text it last saw until
 * it comes into sight, or the playing ends.
 */
import { getContext, setContext } from 'svelte';
import { setApp, useApp } from './context';
import type { AppState } from './state.svelte';

const SIGHT = Symbol('sight');

/** Tell whether an element is in sight, or nearly, whenever that changes; ends with the returned function. */
export function watchSight(element: Element, tell: (inSight: boolean) => void): () => void {
  const observer = new IntersectionObserver(
    (entries) => tell(entries.at(-1)!.isIntersecting),
    { rootMargin: '120px' },
  );
  observer.observe(element);
  return () => observer.disconnect();
}

/** Tells whether the station is in sight, so that what costs much is asked for only then. */
export const useSight = () => getContext<() => boolean>(SIGHT);

/** Milliseconds without a playing text after which what was never in sight is asked for, too. */
const AT_REST = 4000;

/**
 * Tells whether the station has been in sight, so that what stays is asked for once.
 *
 * A reader who has all of the page at rest before them may print it.
 */
export function useSeen(): () => boolean {
  const app = useApp();
  const inSight = useSight();
  let seen = $state(false);
  $effect(() => {
    if (inSight()) seen = true;
    if (seen || app.status === 'playing') return;
    const timer = setTimeout(() => (seen = true), AT_REST);
    return () => clearTimeout(timer);
  });
  return () => seen;
}

/** Give the components below an app whose text stands still while it is played out of sight. */
export function provideSight(inSight: () => boolean): void {
  const app = useApp();
  const awake = () => inSight() || app.status !== 'playing';
  setContext(SIGHT, inSight);
  const held: Partial<Record<keyof AppState, () => unknown>> = {
    steps: hold(() => app.steps, awake),
    ids: hold(() => app.ids, awake),
    selected: hold(() => app.selected, awake),
    current: hold(() => app.current, awake),
    detail: hold(() => app.detail, awake),
    detailAt: hold(() => app.detailAt, awake),
  };
  const seen = new Proxy(app, {
    get(target, name) {
      const read = held[name as keyof AppState];
      if (read) return read();
      const value: unknown = Reflect.get(target, name, target);
      return typeof value === 'function' ? value.bind(target) : value;
    },
    set: (target, name, value) => Reflect.set(target, name, value, target),
  });
  setApp(seen);
}

function hold<T>(read: () => T, awake: () => boolean): () => T {
  let last: T;
  let known = false;
  const value = $derived.by(() => {
    if (awake() || !known) {
      last = read();
      known = true;
    }
    return last;
  });
  return () => value;
}
