import { assert, test } from "vitest";
import { decodeFrame } from "./frames.ts";

// The same bytes are written in tests/unit/events/test_binary.py.
const FRAME =
  "01000000030000000500000000000000070000000000000003000000050000006a6f625f6100000002000000340000000500" +
  "000000000000000000000001000000e0f298cab779420300000002000000030002000000003f0000c07f0000807f01000200" +
  "010000001b0000007b22736571223a362c226b696e64223a2266696e6973686564227d00";

function bytes(hex: string): ArrayBuffer {
  return Uint8Array.from(hex.match(/../g) ?? [], (pair) => Number.parseInt(pair, 16)).buffer;
}

test("a binary frame is read as Python wrote it", () => {
  const frame = decodeFrame(bytes(FRAME));
  assert.deepEqual({ ...frame, events: frame.events.length }, { job_id: "job_a", first_seq: 5, count: 3, events: 2 });
  const [gradient, finished] = frame.events;
  assert.ok(gradient.kind === "gradient");
  assert.deepEqual([...gradient.norms], [0.5, Number.NaN, Number.POSITIVE_INFINITY]);
  assert.deepEqual(gradient.anomalous, [1, 2]);
  assert.deepEqual([gradient.seq, gradient.step, gradient.attempt, gradient.num_rollbacks], [5, 2 ** 40, 3, 2]);
  assert.strictEqual(gradient.at, "2026-01-02T03:04:05.678Z");
  const expected: unknown = { seq: 6, kind: "finished" };
  assert.deepEqual<unknown>(finished, expected);
});

test("a frame of another version is refused", () => {
  assert.throws(() => decodeFrame(bytes("09" + "00".repeat(23))), /version 9/);
});
