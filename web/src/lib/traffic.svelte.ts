/** What others ask of the server that the page stands in, as it happens. */
import { ApiError, isAbort, traffic } from './api';
import type { TrafficEvent, WatchedRequest } from './types';

export class Traffic {
  /** The newest first. */
  requests: WatchedRequest[] = $state.raw([]);
  /** Why nothing more comes, '' where nobody says; null while it does. */
  lost: string | null = $state(null);

  /** Follow the list until `signal` aborts. */
  async follow(signal: AbortSignal): Promise<void> {
    this.lost = null;
    let known: WatchedRequest[] = []; // a server that was started again counts from one again
    try {
      await traffic((event) => {
        if (event.type === 'error') this.lost = event.message;
        else this.requests = known = merged(known, event);
      }, signal);
      this.lost ??= '';
    } catch (error) {
      if (isAbort(error)) return;
      if (!(error instanceof ApiError)) throw error;
      this.lost = error.message;
    }
  }
}

/** The list after an event, the newest request first. */
function merged(known: WatchedRequest[], { requests, oldest }: TrafficEvent): WatchedRequest[] {
  const all = new Map([...known, ...requests].map((request) => [request.number, request]));
  return [...all.values()]
    .filter((request) => request.number >= oldest)
    .sort((a, b) => b.number - a.number);
}
