"""The events of a job, as users see them: in the log, on the wire, in the browser.

A rank appends events to its spool; the supervisor stores them with a per-job `seq` and publishes them; the service adds
its own (`state`). Every event is one of the frozen dataclasses below; its name in JSON is `kind`. Floats that a broken
training produces (NaN, Infinity) are values, not errors: the codec writes them as strings.

A kind is declared here and nowhere else: its fields with their documentation, how the database stores it, its line in
the log, whether overviews fold it. `make generate` writes its TypeScript and its section of docs/reference/events.md.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Literal, TypeVar, dataclass_transform, get_args

from apt_jobs.jobs.monitor_options import IncidentKind, PolicyAction

AnomalyKind = Literal["nan", "inf", "exploding", "vanishing"]
ANOMALY_KINDS: tuple[AnomalyKind, ...] = get_args(AnomalyKind)


@dataclass(frozen=True, slots=True)
class Series:
    """A kind whose numbers are kept at several rollup levels, to be drawn over any range of steps."""

    columns: tuple[str, ...]  # empty: one for each layer
    leader: str | None = None  # the kind whose segments its own are; None: it begins them itself


@dataclass(frozen=True, slots=True)
class LogLine:
    """How the job's log shows a kind."""

    source: str
    template: str | None  # with fields in braces; None: `lineOf` of the page has a case for what it shows
    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True)
class Event:
    """What all kinds declare. A class attribute that a kind does not set is as here."""

    kind: ClassVar[str]  # its name in JSON
    stored_as: ClassVar[Literal["row", "columns"]] = "row"  # columns: of steps, many together (`columns.py`)
    series: ClassVar[Series | None] = None
    log_line: ClassVar[LogLine | None] = None
    is_folded: ClassVar[bool] = False  # a watcher that asks for a `max_rate` gets several as one
    is_monitored: ClassVar[bool] = False  # the gradient monitor of a rank writes it


_Kind = TypeVar("_Kind", bound=Event)
_declared: list[type[Event]] = []


@dataclass_transform(frozen_default=True)
def event(cls: type[_Kind]) -> type[_Kind]:
    """Declare a kind of event: a frozen dataclass that is in `EVENT_TYPES`."""
    declared = dataclass(frozen=True, slots=True)(cls)
    _declared.append(declared)
    return declared


@event
class StateChanged(Event):
    """The job entered a state. Written in the transaction that changed it."""

    kind: ClassVar[str] = "state"
    log_line = LogLine("job", None)
    state: str
    previous: str | None
    reason: str | None = None


@event
class TrainingStarted(Event):
    """An attempt's ranks are up and about to train."""

    kind: ClassVar[str] = "started"
    log_line = LogLine("training", None)
    world_size: int
    device: str  # "cpu", or the name of rank 0's GPU
    backend: str  # "gloo" or "nccl"
    num_parameters: int
    num_steps: int  # optimizer steps of the whole job
    steps_per_epoch: int
    tokens_per_step: int  # over all ranks
    resumed_from_step: int  # 0: from the start
    model_config: dict[str, int | float | bool | str | None]
    num_trainable_parameters: int | None = None  # fewer than all: an adapter is trained, or layers are frozen


@event
class LayersNamed(Event):
    """Names of the model's layers (parameters), in the order of every later `gradient` event of this attempt."""

    kind: ClassVar[str] = "layers"
    is_monitored = True
    names: tuple[str, ...]


@event
class StepTrained(Event):
    """One optimizer step: mean loss over all ranks' micro batches."""

    kind: ClassVar[str] = "metric"
    stored_as = "columns"
    series = Series(("train_loss", "learning_rate", "grad_norm", "step_time_ms", "tokens_per_s"))
    is_folded = True
    is_monitored = True
    step: int  # 1 is the first optimizer step
    epoch: int  # 0 is the first
    train_loss: float
    learning_rate: float
    grad_norm: float  # global, before clipping
    step_time_ms: float
    tokens_per_s: float  # over all ranks


@event
class MetricsLogged(Event):
    """Numbers that a user's script logged, by name: `current_run().log`. At most 500 names a job."""

    kind: ClassVar[str] = "metrics"
    is_monitored = True
    step: int
    rank: int
    values: dict[str, int | float]


@event
class MediaLogged(Event):
    """An image or a table that a user's script logged: `GET /api/jobs/{id}/media/{seq}` has its content."""

    kind: ClassVar[str] = "media"
    is_monitored = True
    step: int
    rank: int
    name: str
    form: Literal["image", "table"]
    filename: str  # in the job's folder of them
    size_bytes: int
    caption: str | None
    num_rows: int | None  # of a table


@event
class ProgressReported(Event):
    """How far a user's script is: `current_run().set_progress`."""

    kind: ClassVar[str] = "progress"
    is_monitored = True
    step: int
    num_steps: int | None  # of the whole run; null: not known
    eta_s: float | None


@event
class Validated(Event):
    """Loss on the validation split, all-reduced: the same on every rank."""

    kind: ClassVar[str] = "validation"
    series = Series(("val_loss",), leader="metric")
    log_line = LogLine("validation", None)
    step: int
    epoch: int
    val_loss: float
    is_best: bool


@event
class SamplesGenerated(Event):
    """What the model of a checkpoint made of the job's `sample_prompts`, in their order."""

    kind: ClassVar[str] = "samples"
    step: int
    prompts: tuple[str, ...]
    texts: tuple[str, ...]  # without the prompts


@event
class GradientsRecorded(Event):
    """L2 norm of every layer's global gradient at one step, in the order of `layers`."""

    kind: ClassVar[str] = "gradient"
    stored_as = "columns"
    series = Series(())
    is_folded = True
    is_monitored = True
    step: int
    norms: tuple[float, ...]
    anomalous: tuple[int, ...]  # indexes into `norms`
    num_rollbacks: int = 0  # of this attempt before this step: steps after a roll-back are trained again


@dataclass(frozen=True, slots=True)
class LayerAnomaly:
    """One layer out of bounds."""

    layer: str
    anomaly: AnomalyKind
    norm: float


@event
class AnomaliesFound(Event):
    """The layers that were out of bounds at one step, at most 1,000 of them: at most one such event a step."""

    kind: ClassVar[str] = "anomaly"
    series = Series(ANOMALY_KINDS, leader="gradient")
    log_line = LogLine("gradients", None, "warning")
    is_monitored = True
    step: int
    layers: tuple[LayerAnomaly, ...]


@event
class RankGradientsRecorded(Event):
    """One rank's own gradients at one step, before the ranks were averaged. In the spool; stored now and then."""

    kind: ClassVar[str] = "rank_gradient"
    stored_as = "columns"
    is_monitored = True
    step: int
    rank: int
    norms: tuple[float, ...]  # L2, in the order of `layers`; empty: not seen (no DDP), or one rank has all
    loss: float | None  # of this rank's own micro batches
    step_time_ms: float | None  # from step to step: nearly the same on all ranks, as the fast ones wait
    compute_time_ms: float | None  # from the last step to this rank's last gradient, before it waits for others
    num_samples: int  # of this rank in this step; the unit of the gradient noise scale
    is_scaled: bool  # AMP: an overflow is normal now and then, and its step is skipped
    num_dropped: int  # records lost so far as the GPU or the disk was too far behind
    num_rollbacks: int = 0  # of this attempt before this step


@event
class BackwardOrderSeen(Event):
    """The order in which gradients become ready: indexes into `layers`. A NaN began in the first one that has it."""

    kind: ClassVar[str] = "backward_order"
    is_monitored = True
    step: int
    order: tuple[int, ...]


@event
class UpdatesMeasured(Event):
    """How large the weights of every layer are and how far one step moved them, in the order of `layers`."""

    kind: ClassVar[str] = "update"
    stored_as = "columns"
    is_monitored = True
    step: int  # whose update it is
    rank: int
    weight_norms: tuple[float, ...]  # L2, after the update; a hair's difference between ranks is a desync
    update_ratios: tuple[float, ...]  # L2 of the update over L2 of the weights; of large layers, of a sample


@event
class RanksJoined(Event):
    """One step as each rank saw it, joined by the supervisor, in the order of ranks; null: that rank has none."""

    kind: ClassVar[str] = "ranks"
    stored_as = "columns"
    step: int
    losses: tuple[float | None, ...]
    grad_norms: tuple[float | None, ...]  # total, of the rank's own gradients
    step_times_ms: tuple[float | None, ...]
    compute_times_ms: tuple[float | None, ...]
    noise_scale: float | None  # B_simple in samples (McCandlish et al. 2018, eq. 2.9); above it batches are wasteful


@event
class IncidentChanged(Event):
    """Something is wrong, still wrong, or over: one `begun`, at most one `updated` a second, one `ended`."""

    kind: ClassVar[str] = "incident"
    log_line = LogLine("monitor", None, "warning")
    incident: int  # number within the attempt
    phase: Literal["begun", "updated", "ended"]
    anomaly: IncidentKind
    group: str  # a block of the model, "all layers", or "rank N"
    began_step: int
    step: int  # the last one on which it was seen
    num_steps: int  # on which it was seen
    layers: tuple[str, ...]  # the worst ones, worst first
    num_layers: int
    ranks: tuple[int, ...]  # where it comes from; empty: all ranks alike
    origin: str | None  # of a value that is not finite: the first layer of the backward pass that has it
    value: float | None  # of the worst layer or rank
    expected_low: float | None
    expected_high: float | None
    message: str


@event
class ActionTaken(Event):
    """A policy responded to an incident: `ordered` by the supervisor, then `done` or `refused` by the ranks."""

    kind: ClassVar[str] = "action"
    log_line = LogLine("policy", None)
    step: int
    phase: Literal["ordered", "done", "refused"]
    action: PolicyAction
    incident: int  # its number within the attempt
    reason: str


@event
class CheckpointSaved(Event):
    """A checkpoint is complete on disk. Its row and this event are one transaction."""

    kind: ClassVar[str] = "checkpoint"
    log_line = LogLine("checkpoint", None)
    checkpoint_id: str
    filename: str  # folder, relative to the checkpoints directory
    step: int
    epoch: int
    val_loss: float | None
    train_loss: float | None
    size_bytes: int
    is_best: bool
    stall_ms: float = 0.0  # for which training stood still
    write_ms: float = 0.0  # of writing, in the background


@event
class CheckpointRemoved(Event):
    """Retention or a user removed a checkpoint."""

    kind: ClassVar[str] = "checkpoint_removed"
    log_line = LogLine("checkpoint", "{checkpoint_id} removed: {reason}")
    checkpoint_id: str
    reason: str


@event
class LineLogged(Event):
    """One line that a rank or the supervisor wrote."""

    kind: ClassVar[str] = "log"
    log_line = LogLine("rank", None)
    is_folded = True
    is_monitored = True
    level: Literal["debug", "info", "warning", "error"]
    source: str  # "rank 0", "torchrun", "supervisor"
    message: str


@event
class RankFailed(Event):
    """A rank raised; the first one is the job's reason."""

    kind: ClassVar[str] = "failure"
    log_line = LogLine("rank", None, "error")
    rank: int
    error: str  # name of the exception's class
    message: str
    traceback: str
    exit_status: int | None = None  # of the command that the job brought


@event
class TrainingFinished(Event):
    """All ranks are done and the last checkpoint is saved."""

    kind: ClassVar[str] = "finished"
    log_line = LogLine("training", "finished at step {step}, best validation loss {best_val_loss}")
    step: int
    epoch: int
    train_loss: float | None
    best_val_loss: float | None


EVENT_TYPES: tuple[type[Event], ...] = tuple(_declared)


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event with its place in the job's log: `seq` is contiguous from 1 within a job."""

    job_id: str
    seq: int
    attempt: int
    at: datetime
    event: Event
