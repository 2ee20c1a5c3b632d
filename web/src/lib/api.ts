/** The server's answers, typed. Every failure becomes an `ApiError` with one sentence. */
import { t } from './i18n.svelte';
import type {
  DenseAnswer,
  DenseRequest,
  ExpertDetail,
  ExpertRequest,
  GenerateEvent,
  GenerateRequest,
  ModelInfo,
  SpecializationAnswer,
  TextRequest,
  TokenDetail,
  TokenRequest,
  TraceAnswer,
  TrainingAnswer,
  TrainingEvent,
} from './types';

/** Characters of a prompt that the server takes (`MAX_TEXT` in server/schema.py). */
export const MAX_TEXT = 20_000;

/** A failure as one sentence for the reader. */
export class ApiError extends Error {}

type Partially<T extends object, K extends keyof T> = Omit<T, K> & Partial<Pick<T, K>>;
type Text = 'prompt' | 'ids' | 'steering';

export const getModel = (signal?: AbortSignal) => get<ModelInfo>('api/model', signal);

export const getSpecialization = (signal?: AbortSignal) =>
  get<SpecializationAnswer>('api/specialization', signal);

export const getTraining = (signal?: AbortSignal) => get<TrainingAnswer>('api/training', signal);

export const trace = (request: Partial<TextRequest>, signal?: AbortSignal) =>
  post<TraceAnswer>('api/trace', request, signal);

export const token = (request: Partially<TokenRequest, Text | 'sampling'>, signal?: AbortSignal) =>
  post<TokenDetail>('api/token', request, signal);

export const expert = (request: Partially<ExpertRequest, Text>, signal?: AbortSignal) =>
  post<ExpertDetail>('api/expert', request, signal);

export const dense = (request: Partial<DenseRequest>, signal?: AbortSignal) =>
  post<DenseAnswer>('api/dense', request, signal);

/** Stream a continuation; resolves when the stream has ended. */
export async function generate(
  request: Partial<GenerateRequest>,
  onEvent: (event: GenerateEvent) => void,
  signal?: AbortSignal,
): Promise<void> {
  await stream(await send('api/generate', signal, request), onEvent);
}

/** Follow a training that runs now, until `signal` aborts. */
export async function trainingLive(
  onEvent: (event: TrainingEvent) => void,
  signal: AbortSignal,
): Promise<void> {
  await stream(await send('api/training/live', signal), onEvent);
}

/** True for the error of a request that was given up on purpose. */
export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === 'AbortError';
}

async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await send(path, signal)).json() as Promise<T>;
}

async function post<T>(path: string, body: object, signal?: AbortSignal): Promise<T> {
  return (await send(path, signal, body)).json() as Promise<T>;
}

async function send(path: string, signal?: AbortSignal, body?: object): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, {
      ...(signal && { signal }),
      ...(body && {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify(body),
      }),
    });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(t('common.serverGone'));
  }
  if (!response.ok) throw new ApiError(await messageOf(response));
  return response;
}

async function messageOf(response: Response): Promise<string> {
  try {
    const { message } = (await response.json()) as { message?: unknown };
    if (typeof message === 'string') return message;
  } catch {
    // Not the server's own words (a proxy's page, say): the status has to do.
  }
  return t('common.serverStatus', { status: response.status });
}

/** Parse server-sent events: `data:` lines, one JSON document an event, parted by blank lines. */
async function stream<T>(response: Response, onEvent: (event: T) => void): Promise<void> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await read(reader);
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop()!;
    for (const event of events) {
      const data = event
        .split(/\r?\n/)
        .filter((line) => line.startsWith('data:'))
        .map((line) => line.slice(5))
        .join('\n');
      if (data) onEvent(JSON.parse(data) as T);
    }
  }
}

async function read(reader: ReadableStreamDefaultReader<string>) {
  try {
    return await reader.read();
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(t('common.serverGone'));
  }
}
