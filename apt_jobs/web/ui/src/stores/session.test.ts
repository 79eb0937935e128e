import { afterEach, assert, beforeEach, test, vi } from "vitest";
import { Session } from "./session.svelte.ts";

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

test("a session that was never there is lost but not known", () => {
  const session = new Session(() => Promise.resolve());
  session.deny();
  assert.deepEqual([session.lost, session.known], [true, false]);
});

test("a lost session is asked for until it is back, and listeners go on then", async () => {
  let signedIn = false;
  let asked = 0;
  const session: Session = new Session(() => {
    asked += 1;
    if (signedIn) session.confirm();
    else session.deny();
    return Promise.resolve();
  });
  let resumed = 0;
  const forget = session.whenBack(() => (resumed += 1));
  session.confirm();
  session.deny();
  await vi.advanceTimersByTimeAsync(9_000);
  assert.deepEqual([asked, session.lost, session.known, resumed], [2, true, true, 0]);
  signedIn = true;
  await vi.advanceTimersByTimeAsync(4_000);
  assert.deepEqual([asked, session.lost, resumed], [3, false, 1]);
  await vi.advanceTimersByTimeAsync(60_000);
  assert.strictEqual(asked, 3, "a session that is there costs nothing");
  forget();
});

test("a service that is away does not end the asking", async () => {
  let asked = 0;
  const session = new Session(() => Promise.reject(new Error(`away ${(asked += 1)}`)));
  session.deny();
  await vi.advanceTimersByTimeAsync(13_000);
  assert.strictEqual(asked, 3);
});
