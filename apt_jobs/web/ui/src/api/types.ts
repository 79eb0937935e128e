// What the REST API answers, as far as the pages read it. Event types are generated: see ../generated/events.ts.
import type { Float, JobState } from "../generated/events.ts";

export interface Progress {
  step: number;
  epoch: number;
  train_loss: Float | null;
  learning_rate: Float | null;
  grad_norm: Float | null;
  tokens_per_s: Float | null;
  val_loss: Float | null;
  best_val_loss: Float | null;
  eta_s: Float | null;
}

export interface AttemptRow {
  attempt: number;
  worker: string | null;
  started_at: string | null;
  ended_at: string | null;
  outcome: string | null;
  reason: string | null;
  resumed_from_step: number | null;
  last_step: number | null;
  steps_lost: number | null; // the next attempt did them again
}

export interface JobError {
  message: string;
  traceback: string | null;
  rank: number | null;
}

export type Json = string | number | boolean | null | Json[] | { [key: string]: Json };
export type JsonObject = { [key: string]: Json };

export interface Job {
  id: string;
  kind: "train" | "generate";
  name: string | null;
  queue: string;
  priority: number;
  labels: Record<string, string>;
  state: JobState;
  attempt: number;
  max_attempts: number;
  created_at: string;
  claimed_at: string | null;
  finished_at: string | null;
  cancel_requested_at: string | null;
  last_seq: number;
  step: number | null;
  num_steps: number | null;
  progress: Partial<Progress> | null;
  result: JsonObject | null;
  error: JobError | null;
  reason: string | null;
  spec: JsonObject;
  schedule_id: string | null;
  attempts?: AttemptRow[] | null;
  queue_position?: number | null;
  waiting_for?: string | null;
}

export interface Page<Row> {
  object: "list";
  data: Row[];
  has_more: boolean;
}

export interface CheckpointRow {
  id: string;
  job_id: string;
  filename: string;
  epoch: number;
  global_step: number;
  val_loss: Float | null;
  train_loss: Float | null;
  file_size_mb: number;
  size_bytes: number;
  is_best: boolean;
  created_at: string;
}

export interface ModelRow {
  id: string;
  source: "checkpoint" | "local";
  name: string;
  job_id: string | null;
  step: number | null;
  val_loss: Float | null;
  created_at: string | null;
  is_default: boolean;
}

export interface DatasetRow {
  name: string;
  size_bytes: number | null;
}
