/** What others ask of the server that the page stands in, as it happens. */
import { ApiError, isAbort, traffic } from './api';
import type { WatchedRequest } from './types';

export class Traffic {
  /** The newest first. */
  requests: WatchedRequest[] = $state.raw([]);
  /** Why nothing more comes; null while it does. */
  lost: string | null = $state(null);

  /** Follow the list until `signal` aborts. */
  async follow(signal: AbortSignal): Promise<void> {
    this.lost = null;
    try {
      await traffic((event) => {
        if (event.type === 'error') this.lost = event.message;
        else this.#merge(event.requests, event.oldest);
      }, signal);
    } catch (error) {
      if (isAbort(error)) return;
      if (!(error instanceof ApiError)) throw error;
      this.lost = error.message;
    }
  }

  #merge(changed: WatchedRequest[], oldest: number): void {
    const known = new Map(this.requests.map((request) => [request.number, request]));
    for (const request of changed) known.set(request.number, request);
    this.requests = [...known.values()]
      .filter((request) => request.number >= oldest)
      .sort((a, b) => b.number - a.number);
  }
}
