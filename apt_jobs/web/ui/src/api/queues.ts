// A queue as `GET /api/queues` tells it.

export interface QueueRow {
  name: string;
  queued: number;
  running: number;
  num_workers: number;
  max_running: number | null; // null: no limit
  paused: boolean;
}
