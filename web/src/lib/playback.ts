/** A continuation, shown token by token: the model is faster than the eye. */
import { ApiError, generate, told } from './api';
import type { End, GenerateRequest, TokenStep } from './types';

/** Milliseconds between two tokens. */
const PACE = { prompt: 25, made: 110 };

interface Listener {
  /** Whether anybody still looks; what comes later is not shown. */
  listening: () => boolean;
  /** `inPrompt` tells whether the reader gave the token, as far as this request knows. */
  onToken: (step: TokenStep, inPrompt: boolean) => void;
  onEnd: (end: End) => void;
}

/** Stream a continuation and show it; resolves when all is shown. */
export async function playBack(
  request: Partial<GenerateRequest>,
  { listening, onToken, onEnd }: Listener,
  signal: AbortSignal,
): Promise<void> {
  const fresh = request.ids === undefined;
  let shown = Promise.resolve();
  let failure: unknown = null;
  const enqueue = (milliseconds: number, show: () => void) => {
    shown = shown.then(async () => {
      await new Promise((resolve) => setTimeout(resolve, milliseconds));
      if (listening() && !failure) show();
    });
  };
  await generate(
    request,
    (event) => {
      if (event.type === 'error') failure = new ApiError(told(event));
      else if (event.type === 'end') enqueue(0, () => onEnd(event.end));
      else {
        const inPrompt = fresh && event.step.in_prompt;
        enqueue(inPrompt ? PACE.prompt : PACE.made, () => onToken(event.step, inPrompt));
      }
    },
    signal,
  );
  if (failure) throw failure;
  await shown;
}
