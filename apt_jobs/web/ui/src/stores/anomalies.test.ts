import { assert, test } from "vitest";
import type { LayerAnomaly } from "../generated/events.ts";
import { AnomalyLog } from "./anomalies.svelte.ts";

const NAN: LayerAnomaly = { layer: "a", anomaly: "nan", norm: "NaN" };
const INF: LayerAnomaly = { layer: "b", anomaly: "inf", norm: "Infinity" };

test("anomalies of a step are counted once, however often they come", () => {
  const log = new AnomalyLog();
  log.load({ nan: 4 }, [{ step: 7, layers: [NAN] }]);
  log.add(7, [NAN]);
  log.add(8, [NAN, INF]);
  log.add(8, [NAN, INF]);
  log.flush();
  assert.deepEqual(log.counts, { nan: 5, inf: 1 });
  assert.strictEqual(log.total, 6);
  assert.deepEqual(
    log.latest.map(({ step, layer }) => [step, layer]),
    [
      [8, "b"],
      [8, "a"],
      [7, "a"],
    ],
  );
});

test("the list stays bounded, the counts go on", () => {
  const log = new AnomalyLog();
  for (let step = 0; step < 5_000; step += 1) log.add(step, [NAN]);
  log.flush();
  assert.deepEqual([log.latest.length, log.latest[0].step, log.total], [300, 4_999, 5_000]);
  log.clear();
  assert.deepEqual([log.latest.length, log.total], [0, 0]);
});
