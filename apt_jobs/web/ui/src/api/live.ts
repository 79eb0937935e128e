// The browser's end of /ws/jobs/{id}?after=seq: every event once, in order, across restarts of anything.
import { socketUrlOf } from "./urls.ts";
import type { StoredEvent } from "../generated/events.ts";
import { decodeFrame, SUBPROTOCOL, type Frame } from "./frames.ts";
import { reachability } from "../stores/reachability.svelte.ts";
import { session } from "../stores/services.ts";
import type { JobAnswer } from "../generated/rest.ts";

/** "ended": the job is over, everything was received, and the connection is closed for good. */
export type LiveStatus = "connecting" | "live" | "reconnecting" | "offline" | "missing" | "login" | "ended";

export interface Hello {
  head: number;
  job: JobAnswer;
  layers: string[];
}

/** The last message about a job that is over; the server closes after it. */
interface End {
  kind: "end";
  state: string;
}

export interface LiveHandlers {
  hello(hello: Hello): void;
  events(events: StoredEvent[]): void;
  status(status: LiveStatus): void;
}

const FIRST_RETRY_MS = 400;
const LONGEST_RETRY_MS = 15_000;
const SILENCE_MS = 16_000; // the server speaks every 5 s
const NO_SUCH_JOB = 4404;
const NOT_AUTHENTICATED = 4401;

export class LiveConnection {
  /** Last seq that was forwarded. */
  seq: number;
  private socket: WebSocket | null = null;
  private retries = 0;
  private retryTimer: ReturnType<typeof setTimeout> | undefined;
  private silenceTimer: ReturnType<typeof setTimeout> | undefined;
  private stopped = false;
  private behind = false;
  private forget: () => void = () => undefined;
  private readonly jobId: string;
  private readonly handlers: LiveHandlers;

  constructor(jobId: string, after: number, handlers: LiveHandlers) {
    this.jobId = jobId;
    this.seq = after;
    this.handlers = handlers;
  }

  start(): void {
    window.addEventListener("online", this.retryNow);
    document.addEventListener("visibilitychange", this.retryNow);
    this.forget = reachability.whenBack(this.retryNow);
    this.handlers.status("connecting");
    this.open();
  }

  stop(): void {
    this.stopped = true;
    window.removeEventListener("online", this.retryNow);
    document.removeEventListener("visibilitychange", this.retryNow);
    this.forget();
    this.close();
  }

  private open(): void {
    const url = socketUrlOf(`/ws/jobs/${encodeURIComponent(this.jobId)}?after=${this.seq}`);
    const socket = new WebSocket(url, SUBPROTOCOL); // a server that does not know it answers in JSON
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.behind = false;
    socket.onmessage = (message: MessageEvent<string | ArrayBuffer>) => {
      if (socket === this.socket) this.receive(message.data);
    };
    socket.onclose = (event) => {
      if (socket === this.socket) this.closed(event.code);
    };
    this.expectMessage();
  }

  private close(): void {
    clearTimeout(this.retryTimer);
    clearTimeout(this.silenceTimer);
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }

  private receive(data: string | ArrayBuffer): void {
    this.expectMessage();
    reachability.noteAnswer();
    if (typeof data !== "string") {
      this.frame(decodeFrame(data));
      return;
    }
    const message = JSON.parse(data) as Partial<Hello> & Partial<Frame> & Partial<End>;
    if (message.kind === "end") this.end();
    else if (message.events !== undefined) this.frame(message as Frame);
    else if (message.job !== undefined) this.hello(message as Hello);
    else if (message.head !== undefined) this.heartbeat(message.head);
  }

  private hello(hello: Hello): void {
    this.retries = 0;
    this.handlers.hello(hello);
    this.handlers.status("live");
  }

  private frame(frame: Frame): void {
    if (frame.first_seq > this.seq + 1) {
      this.reopen(); // a hole: the server fills it from the database
      return;
    }
    const lastSeq = frame.first_seq + frame.count - 1;
    if (lastSeq <= this.seq) return;
    const fresh = frame.events.filter((event) => event.seq > this.seq);
    this.seq = lastSeq;
    this.behind = false;
    this.handlers.events(fresh);
  }

  /** A reconnect would bring the same again. */
  private end(): void {
    this.stop();
    this.handlers.status("ended");
  }

  /** Two heartbeats in a row that know more than we were sent: something was lost on the way. */
  private heartbeat(head: number): void {
    if (head > this.seq && this.behind) this.reopen();
    else this.behind = head > this.seq;
  }

  private reopen(): void {
    this.close();
    this.retry();
  }

  private closed(code: number): void {
    this.close();
    if (code === NO_SUCH_JOB) this.handlers.status("missing");
    else if (code === NOT_AUTHENTICATED) {
      this.handlers.status("login");
      session.deny(); // who opened this connection opens another when there is a session again
    } else {
      void session.check(); // a refused upgrade has no code that a page can see
      this.retry();
    }
  }

  private retry(): void {
    if (this.stopped) return;
    reachability.suspect();
    this.handlers.status(navigator.onLine ? "reconnecting" : "offline");
    const limit = Math.min(LONGEST_RETRY_MS, FIRST_RETRY_MS * 2 ** this.retries);
    this.retries += 1;
    this.retryTimer = setTimeout(() => this.open(), limit * (0.5 + Math.random() / 2));
  }

  private retryNow = (): void => {
    if (this.stopped || this.socket !== null || document.hidden || this.retryTimer === undefined) return;
    clearTimeout(this.retryTimer);
    this.open();
  };

  private expectMessage(): void {
    clearTimeout(this.silenceTimer);
    this.silenceTimer = setTimeout(() => this.reopen(), SILENCE_MS);
  }
}
