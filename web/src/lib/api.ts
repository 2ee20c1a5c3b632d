/** The server's answers, typed. Every failure becomes an `ApiError` with one sentence. */
import { EventSourceParserStream } from 'eventsource-parser/stream';
import { nth, t, type Key, type Language } from './i18n.svelte';
import errors from '../messages/en/errors';
import type {
  AnswerRequest,
  CutAnswer,
  DenseAnswer,
  DenseRequest,
  ErrorEvent,
  ExpertAnswer,
  ExpertRequest,
  GenerateEvent,
  GenerateRequest,
  ModelInfo,
  ReasoningHistory,
  StartAnswer,
  TextRequest,
  TokenDetail,
  TokenRequest,
  TraceAnswer,
  TrafficEvent,
  TrainingAnswer,
  TrainingEvent,
  UnbalancedAnswer,
  UnbalancedRequest,
  WatchedAnswer,
} from './types';

/** A failure as one sentence for the reader; `code` is the server's word for it, if it has one. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly code = '',
  ) {
    super(message);
  }
}

/** Where the key of a server that wants one is kept: as long as the tab is open, and no other's. */
const KEY = 'moescope-key';

/** Send `key` with all questions from now on. */
export function setKey(key: string): void {
  sessionStorage.setItem(KEY, key);
}

/** The header that carries the key, if there is one that a header can carry. */
function authorization(): { Authorization: string } | null {
  const key = sessionStorage.getItem(KEY);
  return key && /^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$/.test(key) ? { Authorization: `Bearer ${key}` } : null;
}

/** Whether the last question found no server. */
let gone = false;

/**
 * Let questions go out again, because the reader asks for something.
 *
 * A browser notes every refused connection in its console. Once the server is gone, what the page
 * would ask by itself is answered here; only what the reader does knocks at its door again.
 */
export function knock(): void {
  gone = false;
}

export const serverGone = () => gone;

type Partially<T extends object, K extends keyof T> = Omit<T, K> & Partial<Pick<T, K>>;
type Text = 'prompt' | 'ids' | 'steering';

export const getModel = (signal?: AbortSignal) => get<ModelInfo>('api/model', signal);

/** All that the page shows first; the HTML has it on its way before any script runs. */
export const getStart = (language: Language) => get<StartAnswer>(`api/start/${language}`);

export const getTraining = (signal?: AbortSignal) => get<TrainingAnswer>('api/training', signal);

export const getReasoning = (signal?: AbortSignal) => get<ReasoningHistory>('api/reasoning', signal);

export const trace = (request: Partial<TextRequest>, signal?: AbortSignal) =>
  post<TraceAnswer>('api/trace', request, signal);

export const token = (request: Partially<TokenRequest, Text | 'sampling'>, signal?: AbortSignal) =>
  post<TokenDetail>('api/token', request, signal);

export const expert = (request: Partially<ExpertRequest, Text>, signal?: AbortSignal) =>
  post<ExpertAnswer>('api/expert', request, signal);

export const cut = (text: string, signal?: AbortSignal) => post<CutAnswer>('api/cut', { text }, signal);

export const dense = (request: Partial<DenseRequest>, signal?: AbortSignal) =>
  post<DenseAnswer>('api/dense', request, signal);

export const unbalanced = (request: Partial<UnbalancedRequest>, signal?: AbortSignal) =>
  post<UnbalancedAnswer>('api/unbalanced', request, signal);

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

/** Follow what others ask of the server that the page stands in, until `signal` aborts. */
export async function traffic(
  onEvent: (event: TrafficEvent | ErrorEvent) => void,
  signal: AbortSignal,
): Promise<void> {
  await stream(await send('api/traffic', signal), onEvent);
}

/** The tokens of an answer that others were given. */
export const getAnswer = (request: AnswerRequest) => post<WatchedAnswer>('api/answer', request);

/** True for the error of a request that was given up on purpose. */
export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === 'AbortError';
}

async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  return counted(async () => answerOf<T>(await send(path, signal)));
}

async function post<T>(path: string, body: object, signal?: AbortSignal): Promise<T> {
  return counted(async () => answerOf<T>(await send(path, signal, body)));
}

/** Questions that have no answer yet; streams are none. */
let asked = 0;

async function counted<T>(question: () => Promise<T>): Promise<T> {
  asked += 1;
  try {
    return await question();
  } finally {
    asked -= 1;
  }
}

/** Milliseconds in which what an answer brought asks no more, and those that answers may take. */
const SILENCE = 250;
const PATIENCE = 10_000;

/** Resolves when all that was asked is answered. */
export async function answered(): Promise<void> {
  const end = Date.now() + PATIENCE;
  for (let quiet = 0; quiet < SILENCE && Date.now() < end; quiet = asked === 0 ? quiet + 50 : 0)
    await new Promise((resolve) => setTimeout(resolve, 50));
}

async function send(path: string, signal?: AbortSignal, body?: object): Promise<Response> {
  if (gone) throw new ApiError(t('common.serverGone'));
  let response: Response;
  try {
    response = await fetch(path, {
      ...(signal && { signal }),
      ...(body && { method: 'POST', body: JSON.stringify(body) }),
      // A mistake that the reader can mend is an answer, not a fault of the page.
      headers: {
        Prefer: 'status=200',
        ...authorization(),
        ...(body && { 'Content-Type': 'application/json' }),
      },
    });
  } catch (error) {
    if (isAbort(error)) throw error;
    gone = true;
    throw new ApiError(t('common.serverGone'));
  }
  // Not the server's own words (a proxy's page, say): the status has to do.
  if (!response.ok) throw new ApiError(t('common.serverStatus', { status: response.status }));
  return response;
}

async function answerOf<T>(response: Response): Promise<T> {
  let answer: T | ErrorEvent;
  try {
    answer = (await response.json()) as T | ErrorEvent;
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(t('common.serverGone'));
  }
  if (isMistake(answer)) throw new ApiError(told(answer), answer.code);
  return answer as T;
}

/** What the server refused, in the reader's language where the page knows the sentence. */
export function told({ message, code, values }: ErrorEvent): string {
  if (!(code in errors)) return t('common.told', { message });
  const { layer } = values;
  return t(`errors.${code}` as Key, typeof layer === 'number' ? { ...values, layer: nth(layer) } : values);
}

const isMistake = (answer: unknown): answer is ErrorEvent =>
  (answer as Partial<ErrorEvent> | null)?.type === 'error';

/** Hand on server-sent events, one JSON document each. */
async function stream<T>(response: Response, onEvent: (event: T) => void): Promise<void> {
  const kind = response.headers.get('Content-Type') ?? '';
  if (!kind.startsWith('text/event-stream')) return void (await answerOf(response));
  const reader = response
    .body!.pipeThrough(new TextDecoderStream())
    .pipeThrough(new EventSourceParserStream())
    .getReader();
  for (;;) {
    const { done, value } = await read(reader);
    if (done) return;
    onEvent(JSON.parse(value.data) as T);
  }
}

async function read<T>(reader: ReadableStreamDefaultReader<T>) {
  try {
    return await reader.read();
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(t('common.serverGone'));
  }
}
