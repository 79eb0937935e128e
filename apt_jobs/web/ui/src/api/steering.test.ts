import { assert, test } from "vitest";
import type { JobState } from "../generated/events.ts";
import { verbsOf, type Verb } from "./steering.ts";

const EXPECTED: Record<JobState, Verb[]> = {
  queued: ["pause", "cancel"],
  running: ["pause", "cancel"],
  pausing: ["cancel"],
  paused: ["resume", "cancel"],
  succeeded: [],
  failed: ["retry"],
  cancelled: ["retry"],
  dead: ["retry"],
};

test("each state offers what the server would do", () => {
  for (const [state, verbs] of Object.entries(EXPECTED)) {
    const job = { id: "job_1", kind: "train" as const, state: state as JobState, cancel_requested_at: null };
    assert.deepEqual(verbsOf(job), verbs, state);
  }
});

test("a generation that runs cannot be paused, one that waits can", () => {
  const job = { id: "job_1", kind: "generate" as const, cancel_requested_at: null };
  assert.deepEqual(verbsOf({ ...job, state: "running" }), ["cancel"]);
  assert.deepEqual(verbsOf({ ...job, state: "queued" }), ["pause", "cancel"]);
});

test("a job that is being cancelled offers nothing, a cancelled one can be retried", () => {
  const job = { id: "job_1", kind: "train" as const, cancel_requested_at: "2026-01-01T00:00:00Z" };
  assert.deepEqual(verbsOf({ ...job, state: "running" }), []);
  assert.deepEqual(verbsOf({ ...job, state: "pausing" }), []);
  assert.deepEqual(verbsOf({ ...job, state: "cancelled" }), ["retry"]);
});
