// What the models of a job's checkpoints made of its sample prompts: the newest ones.
import { get } from "../api/client.ts";
import type { SamplesGenerated, StoredEvent } from "../generated/events.ts";

const NEWEST = 100; // checkpoints: others are in the event log
const LAST_SEQ = 2 ** 53 - 1;

export type SamplesByStep = Record<number, SamplesGenerated>;

/** By step; of a step that was trained again the later attempt counts. */
export function samplesByStep(events: StoredEvent[]): SamplesByStep {
  const found: SamplesByStep = {};
  for (const event of events) if (event.kind === "samples") found[event.step] = event;
  return found;
}

export async function readSamples(jobId: string): Promise<SamplesByStep> {
  const path = `/api/jobs/${encodeURIComponent(jobId)}/events?before=${LAST_SEQ}&limit=${NEWEST}&kind=samples`;
  return samplesByStep((await get<{ data: StoredEvent[] }>(path)).data);
}
