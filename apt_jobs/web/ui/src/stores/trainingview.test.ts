import { assert, beforeEach, test } from "vitest";
import { location } from "./router.svelte.ts";
import { trainingView } from "./trainingview.svelte.ts";

beforeEach(() => window.localStorage.clear());

test("smoothing and scales of the last job are those of the next, unless its address says how", () => {
  location.go("/jobs/job_1");
  trainingView.recall();
  assert.strictEqual(location.query, "");
  trainingView.setSmoothing(0.3);
  trainingView.toggleLog("loss");
  location.go("/jobs/job_2#gradients");
  trainingView.recall();
  assert.deepEqual([trainingView.smoothing, trainingView.isLog("loss"), location.hash], [0.3, true, "#gradients"]);
  location.go("/jobs/job_3?zoom=1-9");
  trainingView.recall();
  assert.deepEqual([trainingView.smoothing, trainingView.isLog("loss")], [0.8, false]);
  window.localStorage.setItem("apt_jobs.training", '{"smooth": 5, "log": null}');
  location.go("/jobs/job_4");
  trainingView.recall();
  assert.strictEqual(location.query, "");
});
