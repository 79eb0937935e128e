import { assert, test } from "vitest";
import type { StoredEvent } from "../generated/events.ts";
import { IncidentLog, troubledSpans } from "./incidents.ts";

function incident(phase: "begun" | "updated" | "ended", step: number, attempt = 1): StoredEvent {
  return {
    seq: step,
    attempt,
    at: `2026-01-01T00:00:${step}Z`,
    kind: "incident",
    incident: 7,
    phase,
    anomaly: "spike",
    group: "layers.1",
    began_step: 10,
    step,
    num_steps: step - 9,
    layers: ["a"],
    num_layers: 1,
    ranks: [],
    origin: null,
    value: 9,
    expected_low: 1,
    expected_high: 2,
    message: "a spike",
  };
}

test("an incident is one entry that follows its events, with what was done about it", () => {
  const log = new IncidentLog();
  const done: StoredEvent = {
    seq: 12,
    attempt: 1,
    at: "",
    kind: "action",
    step: 12,
    phase: "done",
    action: "cut_lr",
    incident: 7,
    reason: "",
  };
  for (const event of [incident("begun", 10), incident("updated", 12), done, done, incident("ended", 20)])
    log.apply(event);
  const [only, ...others] = log.list();
  assert.deepEqual(
    [only.phase, only.num_steps, only.begunAt, only.actions.length, others.length],
    ["ended", 11, "2026-01-01T00:00:10Z", 1, 0],
  );
});

test("attempts number their incidents again", () => {
  const log = new IncidentLog();
  log.apply(incident("begun", 10, 1));
  log.apply(incident("begun", 11, 2));
  assert.deepEqual(
    log.list().map((one) => one.attempt),
    [2, 1],
  );
});

test("spans of trouble do not overlap", () => {
  const log = new IncidentLog();
  log.apply(incident("ended", 20, 1)); // from step 10
  log.apply(incident("ended", 15, 2));
  log.apply({ ...incident("begun", 40, 3), began_step: 40 } as StoredEvent);
  assert.deepEqual(troubledSpans(log.list()), [
    { from: 10, to: 20 },
    { from: 40, to: 40 },
  ]);
});
