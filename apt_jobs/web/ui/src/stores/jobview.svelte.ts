// All that the job page shows: history over REST, then live events, drawn at most once per animation frame.
import type { AnomaliesFound, LayerAnomaly, StoredEvent, TrainingStarted } from "../generated/events.ts";
import { TERMINAL_STATES } from "../generated/events.ts";
import { ApiProblem, get, getBytes, messageOf } from "../api/client.ts";
import {
  curvesOf,
  refined,
  type CurveName,
  type CurvePoints,
  type Curves,
  type MetricsAnswer,
} from "../charts/curves.ts";
import { formatDuration, toNumber } from "../text/format.ts";
import { GradientHistory, rowsOf, type GradientRow } from "./gradients.ts";
import { Curve } from "../charts/curve.ts";
import { IncidentLog } from "./incidents.ts";
import { LiveConnection, type Hello, type LiveStatus } from "../api/live.ts";
import { lineOf, type LogLine } from "./loglines.ts";
import { decodeOverview, OVERVIEW_TYPE, type Overview } from "../api/overview.ts";
import { RankHistory } from "./ranks.ts";
import { Sharpener, spliced, type Range } from "./sharpener.ts";
import type { CheckpointRow, Job, Page, Progress } from "../api/types.ts";

const HISTORY_POINTS = 1500;
const MAX_LOG_LINES = 2_000;
const MAX_LOG_PAGES = 10;
const LOG_KINDS: StoredEvent["kind"][] = [
  "state",
  "started",
  "validation",
  "anomaly",
  "incident",
  "action",
  "checkpoint",
  "checkpoint_removed",
  "log",
  "failure",
  "finished",
];
const MAX_ANOMALIES = 300;
const RANK_EVENTS = 6_000; // of all kinds before the newest: what the ranks did in them is shown
const QUEUE_POLL_MS = 3_000;
const REFRESH_MS = 300;
const SLOW_MS = 250; // tables and heat maps: four times a second is all that eyes can follow

export interface AnomalyLine extends LayerAnomaly {
  step: number;
}

/** What is known of a range of steps more exactly than of the whole job. */
interface Detail {
  range: Range;
  curves: Curves;
  rows: GradientRow[];
}

export class JobView {
  readonly jobId: string;
  job = $state.raw<Job | null>(null);
  progress = $state.raw<Partial<Progress>>({});
  status = $state<LiveStatus>("connecting");
  error = $state<string | null>(null);
  loading = $state(true);
  /** Counts up when curves have new points. */
  version = $state(0);
  /** The same, four times a second at most. */
  slowVersion = $state(0);
  started = $state.raw<TrainingStarted | null>(null);
  log = $state.raw<LogLine[]>([]);
  anomalies = $state.raw<AnomalyLine[]>([]);
  numAnomalies = $state(0);
  anomalyCounts = $state.raw<Record<string, number>>({});
  checkpoints = $state.raw<CheckpointRow[]>([]);

  loss = new Curve();
  rate = new Curve();
  gradNorm = new Curve();
  throughput = new Curve();
  validation = new Curve();
  gradients = new GradientHistory();
  incidents = new IncidentLog();
  ranks = new RankHistory();
  private detail = $state.raw<Detail | null>(null);
  private sharpener = new Sharpener<Detail>(
    (range, signal) => this.loadDetail(range, signal),
    (detail) => {
      this.detail = detail;
      this.schedule();
    },
  );

  private connection: LiveConnection | null = null;
  private frame = 0;
  private stopped = false;
  private pendingLog: LogLine[] = [];
  private pendingAnomalies: AnomalyLine[] = [];
  private slowTimer: ReturnType<typeof setTimeout> | undefined;
  private refreshTimer: ReturnType<typeof setTimeout> | undefined;
  private queueTimer: ReturnType<typeof setInterval> | undefined;
  private stepTimeMs: number | null = null;
  private load = 0;
  private loggedSeq = 0;

  constructor(jobId: string) {
    this.jobId = jobId;
  }

  /** Start; returns the stop function, so that it can be the body of an effect. */
  start(): () => void {
    void this.open();
    this.queueTimer = setInterval(() => {
      if (this.job?.state === "queued" && !document.hidden) void this.refreshJob();
    }, QUEUE_POLL_MS);
    return () => {
      this.stopped = true;
      this.sharpener.stop();
      this.connection?.stop();
      cancelAnimationFrame(this.frame);
      clearTimeout(this.slowTimer);
      clearTimeout(this.refreshTimer);
      clearInterval(this.queueTimer);
    };
  }

  get finished(): boolean {
    return this.job !== null && TERMINAL_STATES.includes(this.job.state);
  }

  refreshJob = async (): Promise<void> => {
    try {
      const job = await get<Job>(this.path());
      if (!this.stopped) this.takeJob(job);
    } catch {
      // The live connection shows that the service is away, and asks again.
    }
  };

  refreshCheckpoints = async (): Promise<void> => {
    try {
      this.checkpoints = (
        await get<Page<CheckpointRow>>(`/api/checkpoints?job_id=${encodeURIComponent(this.jobId)}&limit=200`)
      ).data;
    } catch {
      // As above; the next event about a checkpoint asks again.
    }
  };

  private path(rest = ""): string {
    return `/api/jobs/${encodeURIComponent(this.jobId)}${rest}`;
  }

  /** Everything up to `job.last_seq` over REST, then live from there. Events in both are recognised by their step. */
  private async open(): Promise<void> {
    const load = ++this.load;
    this.connection?.stop();
    try {
      const job = await get<Job>(this.path());
      if (this.stopped || load !== this.load) return;
      this.takeJob(job);
      this.clear();
      const [anomalies] = await Promise.all([this.loadLog(), job.kind === "train" ? this.loadHistory() : undefined]);
      if (this.stopped || load !== this.load) return;
      this.markAnomalies(anomalies);
      this.loading = false;
      this.error = null;
      this.schedule();
      this.connection = new LiveConnection(this.jobId, job.last_seq, {
        hello: (hello) => this.takeHello(hello),
        events: (events) => this.takeEvents(events),
        status: (status) => (this.status = status),
      });
      this.connection.start();
    } catch (error) {
      if (this.stopped || load !== this.load) return;
      if (error instanceof ApiProblem && error.status === 404) this.status = "missing";
      else if (error instanceof ApiProblem && error.status === 401) this.status = "login";
      else {
        this.error = messageOf(error);
        this.refreshTimer = setTimeout(() => void this.open(), QUEUE_POLL_MS);
      }
      this.loading = false;
    }
  }

  /** Show a range of steps as finely as it can be drawn; null: the whole history. */
  zoom = (range: Range | null): void => {
    if (range === null && this.detail === null) this.sharpener.stop();
    else
      this.sharpener.show(
        range === null ? null : [Math.max(0, Math.floor(range[0])), Math.max(0, Math.ceil(range[1]))],
      );
  };

  /** Points of a curve, finer where somebody zoomed in. */
  curve(name: CurveName): CurvePoints {
    const whole = this[name];
    return this.detail === null ? whole : refined(whole, this.detail.curves[name], this.detail.range);
  }

  /** Norms of all layers, finer where somebody zoomed in. */
  gradientRows(): GradientRow[] {
    if (this.detail === null) return this.gradients.rows;
    return spliced(this.gradients.rows, this.detail.rows, (row) => row.step, this.detail.range);
  }

  /** The norms of the range that somebody zoomed into, or all. */
  rowsInView(): GradientRow[] {
    return this.detail?.rows.length ? this.detail.rows : this.gradients.rows;
  }

  private async loadDetail([from, wanted]: Range, signal: AbortSignal): Promise<Detail> {
    const to = Math.max(from, Math.min(wanted, Math.max(this.loss.lastStep, this.gradients.lastStep))); // later ones come live
    const query = `from_step=${from}&to_step=${to}`;
    const [metrics, overview] = await Promise.all([
      get<MetricsAnswer>(this.path(`/metrics?points=${HISTORY_POINTS}&${query}`), signal),
      this.loadOverview(query, signal),
    ]);
    const names = this.gradients.names;
    const isSame = overview.names.length === names.length; // else another attempt has begun meanwhile
    return { range: [from, to], curves: curvesOf(metrics), rows: isSame ? rowsOf(overview) : [] };
  }

  private async loadOverview(query: string, signal?: AbortSignal): Promise<Overview> {
    return decodeOverview(await getBytes(this.path(`/gradients/overview?${query}`), OVERVIEW_TYPE, signal));
  }

  private clear(): void {
    this.sharpener.stop();
    this.detail = null;
    this.loss = new Curve();
    this.rate = new Curve();
    this.gradNorm = new Curve();
    this.throughput = new Curve();
    this.validation = new Curve();
    this.gradients = new GradientHistory();
    this.incidents = new IncidentLog();
    this.ranks = new RankHistory();
    this.pendingLog = [];
    this.pendingAnomalies = [];
    this.loggedSeq = 0;
    this.log = [];
    this.anomalies = [];
    this.numAnomalies = 0;
    this.anomalyCounts = {};
  }

  private async loadHistory(): Promise<void> {
    const [metrics, overview] = await Promise.all([
      get<MetricsAnswer>(this.path(`/metrics?points=${HISTORY_POINTS}`)),
      this.loadOverview(""),
      this.refreshCheckpoints(),
      this.loadRanks(),
    ]);
    Object.assign(this, curvesOf(metrics));
    if (overview.totalSteps) {
      this.gradients.loadOverview(overview);
      await this.loadLatest(overview);
    }
    this.anomalyCounts = { ...overview.anomalySummary };
    this.numAnomalies = Object.values(overview.anomalySummary).reduce((sum, count) => sum + count, 0);
  }

  /** The newest step as it was, if the last point of the overview stands for several. */
  private async loadLatest(overview: Overview): Promise<void> {
    const last = overview.lastSteps.length - 1;
    if (last < 0 || overview.numSteps[last] === 1) return;
    const [row] = rowsOf(await this.loadOverview(`points=1&from_step=${overview.lastSteps[last]}`));
    if (row) this.gradients.setLatest(row);
  }

  private async loadRanks(): Promise<void> {
    const newest = this.job?.last_seq ?? 0;
    let after = Math.max(0, newest - RANK_EVENTS);
    for (let hasMore = true; hasMore && after < newest;) {
      const events = await get<Page<StoredEvent>>(
        this.path(`/events?after=${after}&limit=1000&kind=ranks&kind=rank_gradient`),
      );
      for (const event of events.data) this.ranks.take(event);
      after = events.data[events.data.length - 1]?.seq ?? newest;
      hasMore = events.has_more;
    }
  }

  /** Everything but steps and gradients, whose histories come thinned. Returns the anomalies. */
  private async loadLog(): Promise<AnomaliesFound[]> {
    const kinds = LOG_KINDS.map((kind) => `&kind=${kind}`).join("");
    const anomalies: AnomaliesFound[] = [];
    let after = 0;
    for (let page = 0; page < MAX_LOG_PAGES; page += 1) {
      const events = await get<Page<StoredEvent>>(this.path(`/events?after=${after}&limit=1000${kinds}`));
      for (const event of events.data) {
        after = event.seq;
        this.write(event);
        if (event.kind === "started") this.started = event;
        if (event.kind === "anomaly") anomalies.push(event);
      }
      if (!events.has_more || events.data.length === 0) break;
    }
    return anomalies;
  }

  /** Thinned histories lack most steps: the anomalies of all steps are marked in what is there. */
  private markAnomalies(anomalies: AnomaliesFound[]): void {
    for (const { step, layers } of anomalies) {
      this.gradients.mark(step, layers);
      this.pendingAnomalies.push(...layers.map((layer) => ({ step, ...layer })));
    }
    this.pendingAnomalies.splice(0, this.pendingAnomalies.length - MAX_ANOMALIES);
  }

  private takeJob(job: Job): void {
    this.job = { ...this.job, ...job };
    this.progress = { ...job.progress };
  }

  /** Attempts and the place in the queue are told by REST alone. */
  private takeHello(hello: Hello): void {
    const { attempts, queue_position, waiting_for } = this.job ?? hello.job;
    this.takeJob({ ...hello.job, attempts, queue_position, waiting_for });
    if (hello.layers.length) this.gradients.setNames(hello.layers);
  }

  private takeEvents(events: StoredEvent[]): void {
    for (const event of events) {
      if (event.kind === "started" && event.resumed_from_step < this.loss.lastStep) {
        void this.open(); // steps after this one are trained again: the server knows which count
        return;
      }
      this.take(event);
      this.ranks.take(event);
      this.write(event);
    }
    this.schedule();
  }

  private take(event: StoredEvent): void {
    switch (event.kind) {
      case "metric":
        this.loss.add(event.step, toNumber(event.train_loss));
        this.rate.add(event.step, toNumber(event.learning_rate));
        this.gradNorm.add(event.step, toNumber(event.grad_norm));
        this.throughput.add(event.step, toNumber(event.tokens_per_s));
        this.countStep(event.step, toNumber(event.step_time_ms));
        this.progress = { ...this.progress, ...event, eta_s: this.etaS(event.step) };
        break;
      case "validation":
        this.validation.add(event.step, toNumber(event.val_loss));
        this.progress = {
          ...this.progress,
          val_loss: event.val_loss,
          best_val_loss: event.is_best ? event.val_loss : this.progress.best_val_loss,
        };
        break;
      case "layers":
        this.gradients.setNames(event.names);
        break;
      case "gradient":
        this.gradients.add(event.step, event.norms, event.anomalous);
        break;
      case "anomaly":
        this.countAnomalies(event.step, event.layers);
        break;
      case "started":
        this.started = event;
        if (this.job) this.job = { ...this.job, num_steps: event.num_steps, attempt: event.attempt };
        break;
      case "state":
        if (this.job) this.job = { ...this.job, state: event.state as Job["state"], reason: event.reason };
        this.soon();
        break;
      case "checkpoint":
      case "checkpoint_removed":
      case "failure":
      case "finished":
        this.soon();
        break;
    }
  }

  /** The history may hold events that come live once more: by their seq they are known. */
  private write(event: StoredEvent): void {
    if (event.seq <= this.loggedSeq) return;
    this.loggedSeq = event.seq;
    this.incidents.take(event);
    const line = lineOf(event);
    if (line === null) return;
    const before = this.pendingLog[this.pendingLog.length - 1];
    if (line.story === undefined || before?.story !== line.story) {
      this.pendingLog.push(line);
      return;
    }
    const times = (before.times ?? 1) + 1;
    this.pendingLog[this.pendingLog.length - 1] = {
      ...line,
      seq: before.seq,
      at: before.at,
      since: before.since,
      times,
    };
  }

  private countStep(step: number, timeMs: number): void {
    if (Number.isFinite(timeMs))
      this.stepTimeMs = this.stepTimeMs === null ? timeMs : 0.9 * this.stepTimeMs + 0.1 * timeMs;
    if (this.job && step > (this.job.step ?? 0)) this.job = { ...this.job, step };
  }

  private etaS(step: number): number | null {
    if (this.stepTimeMs === null || !this.job?.num_steps) return null;
    return ((this.job.num_steps - step) * this.stepTimeMs) / 1000;
  }

  private countAnomalies(step: number, layers: LayerAnomaly[]): void {
    const known = this.pendingAnomalies[this.pendingAnomalies.length - 1]?.step ?? this.anomalies[0]?.step ?? -1;
    if (step <= known) return;
    const counts = { ...this.anomalyCounts };
    for (const layer of layers) {
      counts[layer.anomaly] = (counts[layer.anomaly] ?? 0) + 1;
      this.pendingAnomalies.push({ step, ...layer });
    }
    this.anomalyCounts = counts;
    this.numAnomalies += layers.length;
    if (this.pendingAnomalies.length > 2 * MAX_ANOMALIES) this.pendingAnomalies.splice(0, MAX_ANOMALIES);
  }

  /** Ask for the job and its checkpoints again: once for a burst of events. */
  private soon(): void {
    clearTimeout(this.refreshTimer);
    this.refreshTimer = setTimeout(() => {
      void this.refreshJob();
      if (this.job?.kind === "train") void this.refreshCheckpoints();
    }, REFRESH_MS);
  }

  /** A hidden tab gets no animation frames: it draws nothing, and catches up with one drawing when it is shown. */
  private schedule(): void {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.version += 1;
      this.slowTimer ??= setTimeout(() => {
        this.slowTimer = undefined;
        this.flushLists();
        this.slowVersion += 1;
      }, SLOW_MS);
    });
    if (this.pendingLog.length > 2 * MAX_LOG_LINES) this.pendingLog.splice(0, MAX_LOG_LINES);
  }

  private flushLists(): void {
    const story = this.pendingLog[this.pendingLog.length - 1];
    if (this.pendingLog.length > 1 || (story !== undefined && story !== this.log[this.log.length - 1])) {
      const known = this.log[this.log.length - 1]?.seq === this.pendingLog[0].seq ? this.log.slice(0, -1) : this.log;
      this.log = [...known, ...this.pendingLog].slice(-MAX_LOG_LINES);
      this.pendingLog = [story]; // it may go on
    }
    if (this.pendingAnomalies.length) {
      this.anomalies = [...this.pendingAnomalies.reverse(), ...this.anomalies].slice(0, MAX_ANOMALIES);
      this.pendingAnomalies = [];
    }
  }
}

export function runningFor(job: Job, now: number): string {
  if (!job.claimed_at) return "–";
  const end = job.finished_at ? Date.parse(job.finished_at) : now;
  return formatDuration((end - Date.parse(job.claimed_at)) / 1000);
}
