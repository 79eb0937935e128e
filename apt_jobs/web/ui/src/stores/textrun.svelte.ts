// One text that a model continues as a stream: what came so far, how fast, what went wrong, and how to stop it.
import { ApiProblem, messageOf, postStream } from "../api/client.ts";
import type { Usage } from "../generated/rest.ts";
import { paceOf, speedOf } from "./generationsettings.ts";

/** What is wrong with a request, by field. */
export function faultsOf(error: unknown): Record<string, string> {
  if (!(error instanceof ApiProblem)) return {};
  return Object.fromEntries(error.faults.map((fault) => [fault.path, fault.message]));
}

export class TextRun {
  input = $state("");
  output = $state("");
  /** Of a text that runs: how much came and how fast; of one that has ended: its tokens a second, or that it was stopped. */
  pace = $state("");
  problem = $state<string | null>(null);
  faults = $state.raw<Record<string, string>>({});
  #abort = $state.raw<AbortController | null>(null);

  get isRunning(): boolean {
    return this.#abort !== null;
  }

  clear(): void {
    this.input = this.output = this.pace = "";
    this.problem = null;
    this.faults = {};
  }

  stop(): void {
    this.#abort?.abort();
  }

  /** Continue a text; returns when it has ended, whatever came of it. */
  async start(options: Record<string, unknown>, input: string): Promise<void> {
    this.clear();
    this.input = input;
    const abort = new AbortController();
    this.#abort = abort;
    const end: { seen: boolean; failure: string | null } = { seen: false, failure: null };
    let firstAt = 0;
    try {
      await postStream(
        "/api/generate",
        { ...options, text: input, stream: true },
        (kind, data) => {
          if (kind === "delta") {
            firstAt ||= performance.now();
            this.output += String(data.text);
            this.pace = paceOf(this.output.length, performance.now() - firstAt);
          } else if (kind === "restarted") {
            this.output = "";
            firstAt = 0;
          } else if (kind === "end") {
            const usage = data.usage as Usage | undefined;
            this.pace = speedOf(usage?.completion_tokens ?? 0, Number(data.generation_time_ms));
            end.seen = true;
          } else end.failure = String(data.detail);
        },
        abort.signal,
      );
      if (!end.seen) this.problem = end.failure ?? "The connection broke off before the text's end.";
    } catch (error) {
      if (abort.signal.aborted) {
        this.pace = "stopped";
      } else {
        this.problem = messageOf(error);
        this.faults = faultsOf(error);
      }
    } finally {
      this.#abort = null;
    }
  }
}
