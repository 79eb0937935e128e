import { afterEach, assert, test } from "vitest";
import { DEFAULTS, keepSettings, keptSettings, paceOf, speedOf } from "./generationsettings.ts";

afterEach(() => window.localStorage.clear());

test("settings are kept across reloads", () => {
  assert.deepEqual(keptSettings(), DEFAULTS);
  const chosen = { model: "prod", maxLength: 7, temperature: 0, topP: 1, seed: 3 };
  keepSettings(chosen);
  assert.deepEqual(keptSettings(), chosen);
});

test("what somebody else wrote is not trusted", () => {
  for (const text of ["{", "[]", "7", '{"maxLength":"9","temperature":-1,"topP":2,"seed":1.5,"model":7}']) {
    window.localStorage.setItem("apt_jobs.generation", text);
    assert.deepEqual(keptSettings(), DEFAULTS);
  }
});

test("the speed of an answer", () => {
  assert.equal(speedOf(40, 1250), "40 tokens in 1,250 ms, 32 a second");
  assert.equal(speedOf(1, 0), "1 token in 0 ms");
});

test("the pace of a text that comes", () => {
  assert.equal(paceOf(1200, 2000), "1,200 characters, 600 a second");
  assert.equal(paceOf(3, 0), "3 characters");
});
