/** Work that is done piece by piece, so that the page answers between the pieces. */

let last = Promise.resolve();

/** Run a task after those before it, once the browser has drawn what they made. */
export function inTurn(task: () => Promise<void>): void {
  last = last.then(drawn).then(task);
}

const drawn = () =>
  new Promise<void>((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
