import { assert, test } from "vitest";
import type { StoredEvent } from "../generated/events.ts";
import { JobLog, type EventPage } from "./joblog.svelte.ts";

const PAGE = 1_000;

function printed(seq: number): StoredEvent {
  const at = "2026-01-02T03:04:05Z";
  return { seq, attempt: 1, at, kind: "log", level: "info", source: "rank 0", message: `line ${seq}` };
}

/** A server with lines 1 to `count`. */
function serverWith(count: number): (before: number) => Promise<EventPage> {
  return (before) => {
    const last = Math.min(count, before - 1);
    const first = Math.max(1, last - PAGE + 1);
    const data = Array.from({ length: Math.max(0, last - first + 1) }, (_, index) => printed(first + index));
    return Promise.resolve({ data, has_more: first > 1 });
  };
}

function range(log: JobLog): [number, number, number] {
  return [log.lines[0].seq, log.lines[log.lines.length - 1].seq, log.lines.length];
}

test("of a long log the newest lines are shown, older ones when they are asked for", async () => {
  const log = new JobLog(serverWith(12_345));
  await log.load(12_345);
  assert.deepEqual(range(log), [11_346, 12_345, 1_000]);
  await log.loadOlder();
  assert.deepEqual(range(log), [10_346, 12_345, 2_000]);
  while (log.hasOlder) await log.loadOlder();
  assert.deepEqual(range(log), [1, 12_345, 12_345]);
});

test("lines that came while older ones were loaded are kept, each once", async () => {
  const log = new JobLog(serverWith(1_500));
  await log.load(1_500);
  const older = log.loadOlder();
  for (let seq = 1_499; seq <= 1_600; seq += 1) log.append(printed(seq));
  await older;
  log.flush();
  assert.deepEqual(range(log), [1, 1_600, 1_600]);
  assert.ok(log.lines.every((line, index) => line.seq === index + 1));
});

test("a followed log stays bounded and can go back to what it dropped", async () => {
  const log = new JobLog(serverWith(30_000));
  await log.load(1_000);
  for (let seq = 1_001; seq <= 30_000; seq += 1) {
    log.append(printed(seq));
    if (seq % 97 === 0) log.flush();
  }
  log.flush();
  assert.deepEqual(range(log), [28_001, 30_000, 2_000]);
  assert.strictEqual(log.hasOlder, true);
  await log.loadOlder();
  assert.deepEqual(range(log), [27_001, 30_000, 3_000]);
  for (let count = 0; count < 50; count += 1) await log.loadOlder();
  assert.strictEqual(log.isFull, true);
  assert.deepEqual(range(log), [10_001, 30_000, 20_000]);
});

test("the same anomaly step after step is one line that counts", async () => {
  const log = new JobLog(serverWith(0));
  await log.load(0);
  const layers = [{ layer: "a", anomaly: "nan" as const, norm: "NaN" as const }];
  for (let step = 1; step <= 3; step += 1) {
    log.append({ seq: step, attempt: 1, at: "2026-01-02T03:04:05Z", kind: "anomaly", step, layers });
    log.flush();
  }
  assert.deepEqual([log.lines.length, log.lines[0].times, log.lines[0].since], [1, 3, 1]);
});

test("a failure to load older lines leaves everything as it is", async () => {
  const server = serverWith(5_000);
  let isAway = false;
  const log = new JobLog((before) => (isAway ? Promise.reject(new Error("away")) : server(before)));
  await log.load(5_000);
  isAway = true;
  await log.loadOlder().then(
    () => assert.fail("it said nothing"),
    () => undefined,
  );
  assert.deepEqual([log.loading, log.hasOlder, ...range(log)], [false, true, 4_001, 5_000, 1_000]);
});
