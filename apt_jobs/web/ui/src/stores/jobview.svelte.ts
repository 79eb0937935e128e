// The job page's stores, kept in step: history over REST up to a `seq`, then live events from there.
import { ApiProblem, messageOf } from "../api/client.ts";
import { LiveConnection, type Hello, type LiveStatus } from "../api/live.ts";
import type { CheckpointAnswer } from "../generated/rest.ts";
import { curvesOf, TrainingCurves, type CurveName, type CurvePoints } from "../charts/curves.ts";
import type { StoredEvent } from "../generated/events.ts";
import { AnomalyLog } from "./anomalies.svelte.ts";
import { ZoomDetail } from "./detail.svelte.ts";
import { GradientHistory, rowsOf } from "./gradients.ts";
import { IncidentLog } from "./incidents.ts";
import { JobHistory, type Started } from "./jobhistory.ts";
import { JobLog } from "./joblog.svelte.ts";
import { JobState } from "./jobstate.svelte.ts";
import { RankHistory } from "./ranks.ts";
import { Redraw } from "./redraw.svelte.ts";
import { session } from "./services.ts";

const QUEUE_POLL_MS = 3_000;
const ENDED_POLL_MS = 15_000; // somebody may retry or delete it
const RETRY_MS = 3_000;
const REFRESH_MS = 300;

export class JobView {
  readonly jobId: string;
  status = $state<LiveStatus>("connecting");
  error = $state<string | null>(null);
  loading = $state(true);
  started = $state.raw<Started | null>(null);
  checkpoints = $state.raw<CheckpointAnswer[]>([]);

  readonly state = new JobState();
  /** A value of its own: who only asks for this does not hear of each event. */
  readonly finished = $derived(this.state.ended);
  readonly log: JobLog;
  readonly anomalies = new AnomalyLog();
  readonly redraw = new Redraw(() => {
    this.log.flush();
    this.anomalies.flush();
  });
  curves = new TrainingCurves();
  gradients = new GradientHistory();
  incidents = new IncidentLog();
  ranks = new RankHistory();
  private readonly history: JobHistory;
  private readonly detail: ZoomDetail;
  private connection: LiveConnection | null = null;
  private stopped = false;
  private refreshTimer: ReturnType<typeof setTimeout> | undefined;
  private pollTimer: ReturnType<typeof setTimeout> | undefined;
  private numOpened = 0;
  private range: [number, number] | null = null;
  private forget: () => void = () => undefined;

  constructor(jobId: string) {
    this.jobId = jobId;
    this.history = new JobHistory(jobId);
    this.log = new JobLog(this.history.readLogBefore);
    const whole = (): JobView => this; // the histories are replaced when they are loaded again
    this.detail = new ZoomDetail(this.history, whole, () => this.redraw.request());
  }

  /** Start; returns the stop function, so that it can be the body of an effect. */
  start(): () => void {
    void this.open();
    this.poll();
    this.forget = session.whenBack(() => void this.open());
    return () => {
      this.stopped = true;
      this.forget();
      this.detail.stop();
      this.connection?.stop();
      this.redraw.stop();
      clearTimeout(this.refreshTimer);
      clearTimeout(this.pollTimer);
    };
  }

  get job(): JobState["job"] {
    return this.state.job;
  }

  /** Show a range of steps as finely as it can be drawn; null: the whole history. */
  zoom = (range: [number, number] | null): void => {
    this.range = range;
    if (!this.loading) this.detail.show(range);
  };

  /** Points of a curve, finer where somebody zoomed in. */
  curve(name: CurveName): CurvePoints {
    return this.detail.curve(name);
  }

  /** Norms of all layers, finer where somebody zoomed in. */
  gradientRows(): GradientHistory["rows"] {
    return this.detail.rows();
  }

  /** The norms of the range that somebody zoomed into, or all. */
  rowsInView(): GradientHistory["rows"] {
    return this.detail.rowsInView();
  }

  refreshJob = async (): Promise<void> => {
    try {
      const { answer, exact } = await this.history.readJob();
      if (this.stopped) return;
      this.state.receive(answer, exact);
      if (this.status === "ended" && !this.finished) void this.open(); // it was retried
    } catch (error) {
      if (error instanceof ApiProblem && error.status === 404) this.miss();
      // Else the live connection shows that the service is away, and asks again.
    }
  };

  refreshCheckpoints = async (): Promise<void> => {
    try {
      this.checkpoints = await this.history.readCheckpoints();
    } catch {
      // As above; the next event about a checkpoint asks again.
    }
  };

  /** Everything up to `job.last_seq` over REST, then live from there. */
  private async open(): Promise<void> {
    const opened = ++this.numOpened;
    const isStale = (): boolean => this.stopped || opened !== this.numOpened;
    this.connection?.stop();
    clearTimeout(this.refreshTimer);
    try {
      const { answer: job, exact } = await this.history.readJob();
      if (isStale()) return;
      this.state.receive(job, exact);
      this.clear();
      await Promise.all([this.log.load(job.last_seq), job.kind === "train" ? this.load(job.last_seq) : undefined]);
      if (isStale()) return;
      this.loading = false;
      this.error = null;
      if (this.range) this.detail.show(this.range);
      this.redraw.request();
      this.connect(job.last_seq);
    } catch (error) {
      if (!isStale()) this.fail(error);
    }
  }

  private connect(lastSeq: number): void {
    this.connection = new LiveConnection(this.jobId, lastSeq, {
      hello: (hello) => this.receiveHello(hello),
      events: (events) => this.receiveEvents(events),
      status: (status) => {
        this.status = status;
        if (status === "ended") void this.refreshJob(); // its result and its end
      },
    });
    this.connection.start();
  }

  private fail(error: unknown): void {
    this.loading = false;
    if (error instanceof ApiProblem && error.status === 404) this.miss();
    else if (error instanceof ApiProblem && error.status === 401) this.status = "login";
    else {
      this.error = messageOf(error);
      this.refreshTimer = setTimeout(() => void this.open(), RETRY_MS);
    }
  }

  private miss(): void {
    this.connection?.stop();
    this.status = "missing";
  }

  /** Places in the queue, what Slurm says, and ends are no events: ask, while somebody looks. */
  private poll(): void {
    const everyMs = this.finished ? ENDED_POLL_MS : QUEUE_POLL_MS;
    this.pollTimer = setTimeout(() => {
      const isWaiting = this.job?.state === "queued" || Boolean(this.job?.waiting_for);
      const isAsked = isWaiting || this.status === "ended";
      if (isAsked && !document.hidden && !session.lost) void this.refreshJob();
      this.poll();
    }, everyMs);
  }

  private clear(): void {
    this.detail.clear();
    this.curves = new TrainingCurves();
    this.gradients = new GradientHistory();
    this.incidents = new IncidentLog();
    this.ranks = new RankHistory();
    this.anomalies.clear();
  }

  private async load(lastSeq: number): Promise<void> {
    const { history } = this;
    const [metrics, overview, started, anomalies, incidents] = await Promise.all([
      history.readMetrics(),
      history.readOverview(),
      history.readStarted(lastSeq),
      history.readNewest(lastSeq, ["anomaly"]),
      history.readNewest(lastSeq, ["incident", "action"]),
      history.readRanks(lastSeq, (event) => this.ranks.apply(event)),
      this.refreshCheckpoints(),
    ]);
    this.started = started;
    this.curves = curvesOf(metrics);
    if (overview.totalSteps) {
      this.gradients.loadOverview(overview);
      const last = overview.lastSteps.length - 1;
      if (last >= 0 && overview.numSteps[last] !== 1) {
        const [row] = rowsOf(await history.readLatest(overview.lastSteps[last])); // its bucket has others, too
        if (row) this.gradients.setLatest(row);
      }
    }
    for (const event of incidents) this.incidents.apply(event);
    const found = anomalies.filter((event) => event.kind === "anomaly");
    for (const { step, layers } of found) this.gradients.mark(step, layers); // downsampled histories lack most steps
    this.anomalies.load(overview.anomalySummary, found);
  }

  private receiveHello(hello: Hello): void {
    this.state.receiveLive(hello.job);
    if (hello.layers.length) this.gradients.setNames(hello.layers);
  }

  private receiveEvents(events: StoredEvent[]): void {
    for (const event of events) {
      if (event.kind === "started" && event.resumed_from_step < this.curves.loss.lastStep) {
        void this.open(); // steps after this one are trained again: the server knows which count
        return;
      }
      this.apply(event);
    }
    this.redraw.request();
  }

  private apply(event: StoredEvent): void {
    this.state.apply(event);
    this.curves.apply(event);
    this.ranks.apply(event);
    this.incidents.apply(event);
    this.log.append(event);
    switch (event.kind) {
      case "layers":
        this.gradients.setNames(event.names);
        break;
      case "gradient":
        this.gradients.add(event.step, event.norms, event.anomalous);
        break;
      case "anomaly":
        this.anomalies.add(event.step, event.layers);
        break;
      case "started":
        void this.history.readStarted(event.seq).then(
          (started) => (this.started = started),
          () => undefined,
        );
        break;
      case "state":
      case "checkpoint":
      case "samples":
      case "checkpoint_removed":
      case "failure":
      case "finished":
        this.refreshSoon();
        break;
    }
  }

  /** Ask for the job and its checkpoints again: once for a burst of events. */
  private refreshSoon(): void {
    clearTimeout(this.refreshTimer);
    this.refreshTimer = setTimeout(() => {
      void this.refreshJob();
      if (this.job?.kind === "train") void this.refreshCheckpoints();
    }, REFRESH_MS);
  }
}
