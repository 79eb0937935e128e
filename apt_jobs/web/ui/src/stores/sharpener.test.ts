import { assert, test } from "vitest";
import { GradientHistory } from "./gradients.ts";
import { decodeOverview, hasBit } from "../api/overview.ts";
import { Sharpener, spliced, type Range } from "./sharpener.ts";

/** Two points of two layers, as docs/explanation/histories.md lays them out. */
function overviewBytes(): ArrayBuffer {
  const rest = new TextEncoder().encode(
    JSON.stringify({
      names: ["a", "b"],
      layer_statistics: { mean: [1, 2], std: [0, 0], min: [1, 2], max: [1, 2], anomaly_count: [0, 1] },
      anomaly_summary: { nan: 1 },
      total_steps: 32,
    }),
  );
  const half = (value: number): number => new Uint32Array(new Float32Array([value]).buffer)[0] >>> 16;
  const values = [1, 2, 1, 2, 4, 4, 4, 4, 1.5, 3, 1.5, Number.NaN].map(half); // min, max, mean
  const buffer = new ArrayBuffer(24 + 2 * 20 + 2 * values.length + 2 + rest.length);
  new Uint32Array(buffer, 0, 6).set([1, 2, 2, 2, rest.length, 0]);
  new Float64Array(buffer, 24, 4).set([1, 17, 16, 32]);
  new Uint32Array(buffer, 56, 2).set([16, 16]);
  new Uint16Array(buffer, 64, values.length).set(values);
  new Uint8Array(buffer, 64 + 2 * values.length).set([0b1000, 0b1000, ...rest]);
  return buffer;
}

test("an overview is read from its bytes", () => {
  const overview = decodeOverview(overviewBytes());
  assert.deepEqual([...overview.lastSteps], [16, 32]);
  assert.deepEqual([...(overview.max ?? [])], [4, 4, 4, 4]);
  assert.strictEqual(overview.mean[1], 3);
  assert.deepEqual(
    [2, 3].map((index) => hasBit(overview.nonfinite, index)),
    [false, true],
  );
  assert.strictEqual(overview.totalSteps, 32);
});

test("an overview of another version is refused", () => {
  const buffer = overviewBytes();
  new Uint32Array(buffer, 0, 1)[0] = 9;
  assert.throws(() => decodeOverview(buffer), /version 9/);
});

test("gradients that begin with an overview go on live", () => {
  const history = new GradientHistory();
  history.loadOverview(decodeOverview(overviewBytes()));
  assert.deepEqual(
    history.rows.map((row) => row.step),
    [16, 32],
  );
  assert.ok(Number.isNaN(history.rows[1].norms[1]));
  assert.strictEqual(history.rows[1].anomalous[1], 1);
  assert.deepEqual([...(history.rows[0].max ?? [])], [4, 4]);
  history.add(41, [7, 7], []);
  assert.strictEqual(history.rows[2].step, 41);
  assert.strictEqual(history.statistics()[0].max, 7);
});

test("fine steps take the place of coarse ones", () => {
  const steps = (from: number, to: number, by: number) =>
    Array.from({ length: (to - from) / by + 1 }, (_, index) => from + index * by);
  const seen = spliced(steps(0, 100, 10), steps(30, 40, 1), (step) => step, [30, 40]);
  assert.deepEqual(seen, [0, 10, 20, ...steps(30, 40, 1), 50, 60, 70, 80, 90, 100]);
});

test("only the newest range is fetched, and one that comes late is not shown", async () => {
  const [asked, taken]: [Range[], (Range | null)[]] = [[], []];
  const answers: (() => void)[] = [];
  const sharpener = new Sharpener<Range>(
    (range) => {
      asked.push(range);
      return new Promise((resolve) => answers.push(() => resolve(range)));
    },
    (detail) => taken.push(detail),
    1,
  );
  const turn = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 5));
  sharpener.show([0, 50]);
  sharpener.show([10, 40]);
  await turn();
  sharpener.show([20, 30]);
  await turn();
  for (const answer of answers) answer();
  await turn();
  sharpener.show(null);
  assert.deepEqual(asked, [
    [10, 40],
    [20, 30],
  ]);
  assert.deepEqual(taken, [[20, 30], null]);
});
