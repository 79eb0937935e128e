// The one way to the REST API: JSON in and out, problem+json as an exception, 401 as a state of the whole page.
import { parseExact, type Exact } from "./exact.ts";
import { urlOf } from "./urls.ts";

const TIMEOUT_MS = 30_000;
const GATEWAY_ERRORS = [502, 503, 504]; // a proxy's words, or a service without its database
const GENERATE_TIMEOUT_MS = 650_000; // longer than the server's longest APT_JOBS_GENERATE_WAIT_S

export interface FieldFault {
  path: string; // "model.d_model"
  message: string;
}

/** An RFC 9457 answer, or a failure to get any answer (status 0). */
export class ApiProblem extends Error {
  readonly status: number;
  readonly title: string;
  readonly faults: FieldFault[];

  constructor(status: number, title: string, detail: string, faults: FieldFault[] = []) {
    super(detail || title);
    this.status = status;
    this.title = title;
    this.faults = faults;
  }
}

let onSession: () => void = () => undefined;
let onNoSession: () => void = () => undefined;
let onAnswer: () => void = () => undefined;
let onSilence: () => void = () => undefined;

/** Call `confirmed` whenever a call was made with a session, and `denied` when the server knows none. */
export function watchSession(confirmed: () => void, denied: () => void): void {
  onSession = confirmed;
  onNoSession = denied;
}

/** Call `answered` whenever the service answers, and `silent` when a request got no answer. */
export function watchAnswers(answered: () => void, silent: () => void): void {
  onAnswer = answered;
  onSilence = silent;
}

export async function get<Answer>(path: string, signal?: AbortSignal): Promise<Answer> {
  return request<Answer>("GET", path, undefined, {}, signal);
}

/** An answer twice: as values, and with its numbers as they were written. */
// eslint-disable-next-line @typescript-eslint/no-unnecessary-type-parameters -- as in `get`, the caller names the type
export async function getExact<Answer>(path: string, signal?: AbortSignal): Promise<{ answer: Answer; exact: Exact }> {
  const text = await requestText("GET", path, undefined, {}, signal);
  return { answer: JSON.parse(text) as Answer, exact: parseExact(text) };
}

/** An answer that is not JSON. */
export async function getBytes(path: string, accept: string, signal?: AbortSignal): Promise<ArrayBuffer> {
  const response = await fetchResponse("GET", path, undefined, { Accept: accept }, signal);
  if (response.ok) return response.arrayBuffer();
  throw problemOf(response.status, response.statusText, await response.text());
}

export async function post<Answer>(path: string, body: object, headers: Record<string, string> = {}): Promise<Answer> {
  return request<Answer>("POST", path, JSON.stringify(body), { "Content-Type": "application/json", ...headers });
}

export async function put<Answer>(path: string, body: object): Promise<Answer> {
  return putText<Answer>(path, JSON.stringify(body));
}

/** Send JSON text as it is. */
export async function putText<Answer>(path: string, json: string): Promise<Answer> {
  return request<Answer>("PUT", path, json, { "Content-Type": "application/json" });
}

export async function upload<Answer>(path: string, file: Blob): Promise<Answer> {
  return request<Answer>("POST", path, file, { "Content-Type": "text/plain; charset=utf-8" }, undefined, null);
}

export async function remove(path: string): Promise<void> {
  await request<unknown>("DELETE", path);
}

async function request<Answer>(...request: Parameters<typeof requestText>): Promise<Answer> {
  const text = await requestText(...request);
  return (text ? JSON.parse(text) : null) as Answer;
}

async function requestText(
  method: string,
  path: string,
  body?: BodyInit,
  headers: Record<string, string> = {},
  signal?: AbortSignal,
  timeoutMs?: number | null,
): Promise<string> {
  const response = await fetchResponse(method, path, body, headers, signal, timeoutMs);
  const text = await response.text();
  if (response.ok) return text;
  throw problemOf(response.status, response.statusText, text);
}

async function fetchResponse(
  method: string,
  path: string,
  body?: BodyInit,
  headers: Record<string, string> = {},
  signal?: AbortSignal,
  timeoutMs: number | null = path.includes("generate") ? GENERATE_TIMEOUT_MS : TIMEOUT_MS,
): Promise<Response> {
  const limits = [signal, timeoutMs === null ? undefined : AbortSignal.timeout(timeoutMs)].filter(
    (one) => one !== undefined,
  );
  let response: Response;
  try {
    response = await fetch(urlOf(path), {
      method,
      body,
      headers: { Accept: "application/json", ...headers },
      credentials: "same-origin",
      signal: limits.length ? AbortSignal.any(limits) : undefined,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    onSilence();
    throw new ApiProblem(0, "No answer", `The service did not answer ${method} ${path}. Is it running?`);
  }
  if (GATEWAY_ERRORS.includes(response.status)) onSilence();
  else onAnswer();
  if (response.status === 401) onNoSession();
  else if (response.ok) onSession();
  return response;
}

/** Send JSON and hand over server-sent events as they come, until the stream ends; `signal` ends it, and its job. */
export async function postStream(
  path: string,
  body: unknown,
  onEvent: (kind: string, data: Record<string, unknown>) => void,
  signal: AbortSignal,
): Promise<void> {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const response = await fetchResponse("POST", path, JSON.stringify(body), headers, signal, null);
  if (!response.ok || response.body === null)
    throw problemOf(response.status, response.statusText, await response.text());
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop() ?? "";
    for (const event of events) {
      const kind = /^event: (.*)$/m.exec(event)?.[1];
      const data = /^data: (.*)$/m.exec(event)?.[1];
      if (kind !== undefined && data !== undefined) onEvent(kind, JSON.parse(data) as Record<string, unknown>);
    }
  }
}

interface Problem {
  title?: string;
  detail?: string;
  errors?: { pointer?: string; loc?: (string | number)[]; field?: string; detail?: string; message?: string }[];
}

function problemOf(status: number, statusText: string, text: string): ApiProblem {
  let problem: Problem = {};
  try {
    problem = JSON.parse(text) as Problem;
  } catch {
    // A proxy in between answered with something else: its status has to do.
  }
  const faults = (problem.errors ?? []).map((fault) => ({
    path: pathOf(fault.pointer ?? fault.field ?? (fault.loc ?? []).join(".")),
    message: fault.detail ?? fault.message ?? "",
  }));
  return new ApiProblem(status, problem.title ?? (statusText || `HTTP ${status}`), problem.detail ?? "", faults);
}

/** "#/model/d_model", "/model/d_model" and "train.model.d_model" all name model.d_model. */
function pathOf(pointer: string): string {
  const path = pointer.replace(/^#?\//, "").replaceAll("/", ".");
  return path.replace(/^(body\.)?(train\.|generate\.)?/, "");
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
