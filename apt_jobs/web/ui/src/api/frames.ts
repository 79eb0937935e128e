// Reads the binary form of a frame (docs/explanation/streams.md): gradient norms are views of the bytes that came, not parsed text.
import type { StoredEvent } from "../generated/events.ts";

export const SUBPROTOCOL = "apt-jobs.binary.v1";

export interface Frame {
  job_id?: string;
  first_seq: number;
  /** How many places of the sequence the frame covers. */
  count: number;
  events: StoredEvent[];
}

const VERSION = 1;
const HEADER_BYTES = 24;
const RECORD_BYTES = 8;
const GRADIENT_BYTES = 36;
const [JSON_EVENT, GRADIENT, JOB] = [1, 2, 3];

const utf8 = new TextDecoder();

export function decodeFrame(buffer: ArrayBuffer): Frame {
  const view = new DataView(buffer);
  if (view.getUint8(0) !== VERSION) throw new Error(`a binary frame of version ${view.getUint8(0)}`);
  const firstSeq = integer(view, 8);
  const frame: Frame = { first_seq: firstSeq, count: integer(view, 16) - firstSeq + 1, events: [] };
  let at = HEADER_BYTES;
  for (let left = view.getUint32(4, true); left > 0; left -= 1) {
    const kind = view.getUint8(at);
    const length = view.getUint32(at + 4, true);
    at += RECORD_BYTES;
    if (kind === GRADIENT) frame.events.push(gradient(buffer, view, at));
    else {
      const text = utf8.decode(new Uint8Array(buffer, at, length));
      if (kind === JSON_EVENT) frame.events.push(JSON.parse(text) as StoredEvent);
      else if (kind === JOB) frame.job_id = text;
    }
    at += length + (-length & 3);
  }
  return frame;
}

function gradient(buffer: ArrayBuffer, view: DataView, at: number): StoredEvent {
  const numNorms = view.getUint16(at + 32, true);
  const numAnomalous = view.getUint16(at + 34, true);
  const anomalous = new Array<number>(numAnomalous);
  for (let index = 0; index < numAnomalous; index += 1) {
    anomalous[index] = view.getUint16(at + GRADIENT_BYTES + 4 * numNorms + 2 * index, true);
  }
  return {
    seq: integer(view, at),
    kind: "gradient",
    attempt: view.getUint32(at + 24, true),
    at: new Date(view.getFloat64(at + 16, true)).toISOString(),
    step: integer(view, at + 8),
    norms: new Float32Array(buffer, at + GRADIENT_BYTES, numNorms) as unknown as number[],
    anomalous,
    num_rollbacks: view.getUint32(at + 28, true),
  };
}

/** 64 bits, of which a number holds 53: enough for every seq. */
function integer(view: DataView, at: number): number {
  return view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
}
