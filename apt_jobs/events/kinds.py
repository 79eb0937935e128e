"""The events of a job, as users see them: in the log, on the wire, in the browser.

A rank appends events to its spool; the supervisor stores them with a per-job `seq` and publishes them; the service adds
its own (`state`). Every event is one of the frozen dataclasses below; its name in JSON is `kind`. Floats that a broken
training produces (NaN, Infinity) are values, not errors: the codec writes them as strings.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Literal

from apt_jobs.jobs.spec import IncidentKind, PolicyAction

AnomalyKind = Literal["nan", "inf", "exploding", "vanishing"]


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The job entered a state. Written in the transaction that changed it."""

    kind: ClassVar[str] = "state"
    state: str
    previous: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    """An attempt's ranks are up and about to train."""

    kind: ClassVar[str] = "started"
    world_size: int
    device: str  # "cpu", or the name of rank 0's GPU
    backend: str  # "gloo" or "nccl"
    num_parameters: int
    num_steps: int  # optimizer steps of the whole job
    steps_per_epoch: int
    tokens_per_step: int  # over all ranks
    resumed_from_step: int  # 0: from the start
    model_config: dict[str, int | float | bool | str | None]


@dataclass(frozen=True, slots=True)
class LayersNamed:
    """Names of the model's layers (parameters), in the order of every later `gradient` event of this attempt."""

    kind: ClassVar[str] = "layers"
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepTrained:
    """One optimizer step: mean loss over all ranks' micro batches."""

    kind: ClassVar[str] = "metric"
    step: int  # 1 is the first optimizer step
    epoch: int  # 0 is the first
    train_loss: float
    learning_rate: float
    grad_norm: float  # global, before clipping
    step_time_ms: float
    tokens_per_s: float  # over all ranks


@dataclass(frozen=True, slots=True)
class MetricsLogged:
    """Numbers that a user's script logged, by name: `current_run().log`. At most 500 names a job."""

    kind: ClassVar[str] = "metrics"
    step: int
    rank: int
    values: dict[str, int | float]


@dataclass(frozen=True, slots=True)
class ProgressReported:
    """How far a user's script is: `current_run().set_progress`."""

    kind: ClassVar[str] = "progress"
    step: int
    num_steps: int | None  # of the whole run; null: not known
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Validated:
    """Loss on the validation split, all-reduced: the same on every rank."""

    kind: ClassVar[str] = "validation"
    step: int
    epoch: int
    val_loss: float
    is_best: bool


@dataclass(frozen=True, slots=True)
class GradientsRecorded:
    """L2 norm of every layer's global gradient at one step, in the order of `layers`."""

    kind: ClassVar[str] = "gradient"
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


@dataclass(frozen=True, slots=True)
class AnomaliesFound:
    """The layers that were out of bounds at one step, at most 1,000 of them: at most one such event a step."""

    kind: ClassVar[str] = "anomaly"
    step: int
    layers: tuple[LayerAnomaly, ...]


@dataclass(frozen=True, slots=True)
class RankGradientsRecorded:
    """One rank's own gradients at one step, before the ranks were averaged. In the spool; stored now and then."""

    kind: ClassVar[str] = "rank_gradient"
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


@dataclass(frozen=True, slots=True)
class BackwardOrderSeen:
    """The order in which gradients become ready: indexes into `layers`. A NaN began in the first one that has it."""

    kind: ClassVar[str] = "backward_order"
    step: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UpdatesMeasured:
    """How large the weights of every layer are and how far one step moved them, in the order of `layers`."""

    kind: ClassVar[str] = "update"
    step: int  # whose update it is
    rank: int
    weight_norms: tuple[float, ...]  # L2, after the update; a hair's difference between ranks is a desync
    update_ratios: tuple[float, ...]  # L2 of the update over L2 of the weights; of large layers, of a sample


@dataclass(frozen=True, slots=True)
class RanksJoined:
    """One step as each rank saw it, joined by the supervisor, in the order of ranks; null: that rank has none."""

    kind: ClassVar[str] = "ranks"
    step: int
    losses: tuple[float | None, ...]
    grad_norms: tuple[float | None, ...]  # total, of the rank's own gradients
    step_times_ms: tuple[float | None, ...]
    compute_times_ms: tuple[float | None, ...]
    noise_scale: float | None  # B_simple in samples (McCandlish et al. 2018, eq. 2.9); above it batches are wasteful


@dataclass(frozen=True, slots=True)
class IncidentChanged:
    """Something is wrong, still wrong, or over: one `begun`, at most one `updated` a second, one `ended`."""

    kind: ClassVar[str] = "incident"
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


@dataclass(frozen=True, slots=True)
class ActionTaken:
    """A policy responded to an incident: `ordered` by the supervisor, then `done` or `refused` by the ranks."""

    kind: ClassVar[str] = "action"
    step: int
    phase: Literal["ordered", "done", "refused"]
    action: PolicyAction
    incident: int  # its number within the attempt
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is complete on disk. Its row and this event are one transaction."""

    kind: ClassVar[str] = "checkpoint"
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


@dataclass(frozen=True, slots=True)
class CheckpointRemoved:
    """Retention or a user removed a checkpoint."""

    kind: ClassVar[str] = "checkpoint_removed"
    checkpoint_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class LineLogged:
    """One line that a rank or the supervisor wrote."""

    kind: ClassVar[str] = "log"
    level: Literal["debug", "info", "warning", "error"]
    source: str  # "rank 0", "torchrun", "supervisor"
    message: str


@dataclass(frozen=True, slots=True)
class RankFailed:
    """A rank raised; the first one is the job's reason."""

    kind: ClassVar[str] = "failure"
    rank: int
    error: str  # name of the exception's class
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class TrainingFinished:
    """All ranks are done and the last checkpoint is saved."""

    kind: ClassVar[str] = "finished"
    step: int
    epoch: int
    train_loss: float | None
    best_val_loss: float | None


Event = (
    StateChanged
    | TrainingStarted
    | LayersNamed
    | StepTrained
    | MetricsLogged
    | ProgressReported
    | Validated
    | GradientsRecorded
    | AnomaliesFound
    | RankGradientsRecorded
    | BackwardOrderSeen
    | UpdatesMeasured
    | RanksJoined
    | IncidentChanged
    | ActionTaken
    | CheckpointSaved
    | CheckpointRemoved
    | LineLogged
    | RankFailed
    | TrainingFinished
)

EVENT_TYPES: tuple[type[Event], ...] = (
    StateChanged,
    TrainingStarted,
    LayersNamed,
    StepTrained,
    MetricsLogged,
    ProgressReported,
    Validated,
    GradientsRecorded,
    AnomaliesFound,
    RankGradientsRecorded,
    BackwardOrderSeen,
    UpdatesMeasured,
    RanksJoined,
    IncidentChanged,
    ActionTaken,
    CheckpointSaved,
    CheckpointRemoved,
    LineLogged,
    RankFailed,
    TrainingFinished,
)


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event with its place in the job's log: `seq` is contiguous from 1 within a job."""

    job_id: str
    seq: int
    attempt: int
    at: datetime
    event: Event
