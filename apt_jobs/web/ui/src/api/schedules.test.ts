import { assert, test } from "vitest";
import { formatDue, untilDue } from "./schedules.ts";

test("a due time is shown on the clocks of its zone, on both sides of a change of daylight saving time", () => {
  assert.strictEqual(formatDue("2026-07-01T01:30:00Z", "Europe/Berlin"), "Wed, 1 Jul 2026, 03:30");
  assert.strictEqual(formatDue("2026-12-01T02:30:00Z", "Europe/Berlin"), "Tue, 1 Dec 2026, 03:30");
  assert.strictEqual(formatDue("2026-12-01T02:30:00Z", "UTC"), "Tue, 1 Dec 2026, 02:30");
});

test("a zone that the browser does not know gives no time", () => {
  assert.strictEqual(formatDue("2026-07-01T01:30:00Z", "Mars/Olympus"), null);
});

test("the time until a run is rounded up to minutes and never negative", () => {
  const now = Date.parse("2026-01-01T00:00:00Z");
  assert.strictEqual(untilDue("2026-01-01T00:00:30Z", now), "in 1 min");
  assert.strictEqual(untilDue("2026-01-01T03:20:00Z", now), "in 3 h 20 min");
  assert.strictEqual(untilDue("2026-01-11T00:00:00Z", now), "in 10 days");
  assert.strictEqual(untilDue("2025-12-31T00:00:00Z", now), "in 0 min");
});
