/**
 * One question at a time, and the latest one next.
 *
 * The server works through its questions one by one and cannot take back one that it has begun; a
 * slider that asks at every move would leave a queue behind. Questions that a newer one overtook
 * while they waited are never sent.
 */
export class Latest {
  #waiting: (() => Promise<void>) | null = null;
  #busy = false;

  async ask(task: () => Promise<void>): Promise<void> {
    this.#waiting = task;
    if (this.#busy) return;
    this.#busy = true;
    try {
      while (this.#waiting) {
        const next = this.#waiting;
        this.#waiting = null;
        await next();
      }
    } finally {
      this.#busy = false;
    }
  }

  /** Forget the question that waits. */
  drop(): void {
    this.#waiting = null;
  }
}
