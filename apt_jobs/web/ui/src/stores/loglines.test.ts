import { assert, test } from "vitest";
import { LOG_LINES, type StoredEvent } from "../generated/events.ts";
import { lineOf } from "./loglines.ts";

function event(values: Record<string, unknown>): StoredEvent {
  return { seq: 7, attempt: 1, at: "2026-01-02T03:04:05Z", ...values } as unknown as StoredEvent;
}

test("a kind with a declared line needs no case of its own", () => {
  const removed = lineOf(event({ kind: "checkpoint_removed", checkpoint_id: "ckpt_1", reason: "retention" }));
  assert.deepEqual([removed?.source, removed?.message], ["checkpoint", "ckpt_1 removed: retention"]);
  const finished = lineOf(event({ kind: "finished", step: 20000, best_val_loss: null }));
  assert.strictEqual(finished?.message, "finished at step 20,000, best validation loss –");
});

test("steps and gradients are in charts, not in the log", () => {
  assert.isNull(lineOf(event({ kind: "metric", step: 1 })));
  assert.isUndefined(LOG_LINES.gradient);
});
