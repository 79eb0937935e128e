import { assert, test } from "vitest";
import { GradientHistory } from "./gradients.ts";

test("gradient statistics are those of all steps, whatever was downsampled", () => {
  const history = new GradientHistory();
  history.setNames(["a", "b"]);
  for (let step = 1; step <= 9_000; step += 1) {
    history.add(step, [step % 2 ? 1 : 3, step === 123 ? "NaN" : 2], step === 123 ? [1] : []);
  }
  assert.ok(history.rows.length <= history.maxRows);
  const [a, b] = history.statistics();
  assert.ok(Math.abs((a.mean ?? 0) - 2) < 1e-9);
  assert.ok(Math.abs((a.std ?? 0) - 1) < 1e-9);
  assert.strictEqual(b.anomalies, 1);
  assert.strictEqual(b.max, 2);
  assert.ok(
    history.rows.some((row) => row.anomalous[1] === 1 && Number.isNaN(row.norms[1])),
    "the NaN is still there",
  );
});

test("an anomaly of a step that has no row of its own is marked at the next one", () => {
  const history = new GradientHistory();
  history.setNames(["a"]);
  for (const step of [1, 50, 100]) history.add(step, [1], []);
  history.mark(33, [{ layer: "a", anomaly: "nan", norm: "NaN" }]);
  history.mark(34, [{ layer: "unknown", anomaly: "nan", norm: "NaN" }]);
  assert.deepEqual(
    history.rows.map((row) => row.anomalous[0]),
    [0, 1, 0],
  );
  assert.ok(Number.isNaN(history.rows[1].norms[0]));
});
