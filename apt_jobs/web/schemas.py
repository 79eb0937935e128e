"""What REST and the WebSocket say: the bodies of answers, as pydantic models, and rows turned into them."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import zip_longest
from typing import Annotated, Any, Literal, NotRequired  # as pydantic wants it before Python 3.12

from pydantic import BaseModel, ConfigDict, Field, SkipValidation
from typing_extensions import TypedDict

from apt_jobs.db.models import Attempt, Checkpoint, Job
from apt_jobs.events.codec import Number, timestamp
from apt_jobs.jobs.attempt_facts import AttemptFacts
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.needs import decode_needs
from apt_jobs.jobs.spec import BUILTIN_ENTRY_POINT
from apt_jobs.jobs.states import JobState

DEFAULT_MODEL_CONFIG = APTConfig().model_dump(mode="json")


class AttemptAnswer(BaseModel):
    attempt: int
    worker: str
    started_at: str
    ended_at: str | None
    outcome: str | None
    reason: str | None
    resumed_from_step: int | None
    last_step: int | None
    steps_lost: int | None = Field(None, description="Steps that the next attempt did again.")
    facts: AttemptFacts | None = Field(None, description="What it ran with; null: not known, or not yet.")


class MetricSummary(TypedDict):
    """Of one metric that a user script logged."""

    last: Number
    step: int  # of `last`
    best: Number | None  # of the finite values
    best_step: int | None
    goal: Literal["min", "max"]  # whether small or large values are better, guessed by the name
    rank: int  # that logged it


class Progress(TypedDict, total=False):
    """Where a training is. What is not known yet is missing; what is not finite is named."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # read by pydantic, no key

    step: int
    epoch: int
    train_loss: Number
    learning_rate: Number
    grad_norm: Number
    tokens_per_s: Number | None
    val_loss: Number
    best_val_loss: Number
    eta_s: Number | None
    num_parameters: int
    num_trainable_parameters: int | None
    steps_per_epoch: int
    metrics: dict[str, MetricSummary]  # that a user script logged: its first 20 names


class JobError(TypedDict):
    """Why a job failed: what the first rank that failed raised."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # read by pydantic, no key

    message: str
    traceback: str | None
    rank: int | None
    exit_status: NotRequired[int]


class JobAnswer(BaseModel):
    object: Literal["job"] = "job"
    id: str
    kind: Literal["train", "generate"]
    name: str | None
    queue: str
    priority: int
    labels: dict[str, str]
    state: JobState
    reason: str | None
    attempt: int
    max_attempts: int
    created_at: str
    claimed_at: str | None
    finished_at: str | None
    cancel_requested_at: str | None
    last_seq: int
    step: int | None
    num_steps: int | None
    progress: Annotated[Progress | None, SkipValidation]
    result: dict[str, Any] | None
    error: Annotated[JobError | None, SkipValidation]
    spec: dict[str, Any]
    schedule_id: str | None
    sweep_id: str | None
    notes: str | None
    attempts: list[AttemptAnswer] | None = Field(None, description="Only in the view of one job.")
    best_checkpoint: str | None = Field(
        None, description="Id of the one with the lowest validation loss, which is kept. Only in the view of one job."
    )
    queue_position: int | None = Field(
        None, description="1: next. In lists null for jobs far behind; null if it does not wait."
    )
    waiting_for: str | None = Field(None, description="Why it waits, in words; null if it does not wait.")
    expected_start_at: str | None = Field(
        None,
        description="When it will probably start. Only in the view of one job, and in lists whose `fields` name it, of "
        "the first of each queue; null: nobody knows.",
    )
    num_gpus: float | None = Field(
        None, description="GPUs that it asks for, on all machines; null: one for each rank, where there are GPUs."
    )
    num_ranks: int | None = Field(None, description="Processes that train, on all machines; null: it does not train.")
    sparkline: list[float | None] | None = Field(
        None,
        description="Its training loss in at most 24 points, null where it is not finite. Only in lists whose `fields` "
        "name it; null: ask again, reading it took too long.",
    )
    num_preemptions: int = Field(0, description="Times that it yielded to a job of higher priority.")


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobAnswer]
    has_more: bool
    counts: dict[JobState, int] | None = Field(
        None,
        description="Jobs in each state that match all but the states that were asked for; on a large service up to "
        "30 s old. Only with `counts`.",
    )
    total: int | None = Field(None, description="Jobs that match, as of `counts`. Only with `counts`.")


class CheckpointAnswer(BaseModel):
    id: str
    job_id: str
    filename: str
    epoch: int
    global_step: int
    val_loss: float | None
    train_loss: float | None
    file_size_mb: float = Field(description="In 10^6 bytes.")
    size_bytes: int
    is_best: bool
    created_at: str


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointAnswer]
    has_more: bool


class ScheduleRunAnswer(BaseModel):
    due_at: str
    fired_at: str
    outcome: Literal["submitted", "skipped", "missed", "refused"]
    job_id: str | None
    job_state: JobState | None
    reason: str | None


class ScheduleAnswer(BaseModel):
    object: Literal["schedule"] = "schedule"
    id: str
    name: str
    cron: str
    time_zone: str
    job: dict[str, Any]
    overlap: Literal["skip", "queue", "cancel"]
    catch_up: Literal["skip", "latest", "all"]
    paused: bool
    created_at: str
    next_run_at: str | None
    next_runs: list[str]
    last_run: ScheduleRunAnswer | None
    runs: list[ScheduleRunAnswer] | None = Field(None, description="Newest first. Only in the view of one schedule.")


class ScheduleList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ScheduleAnswer]
    has_more: bool = False


class DatasetAnswer(BaseModel):
    name: str
    size_bytes: int | None = Field(description="null: built in.")
    is_builtin: bool
    format: DatasetFormat = DatasetFormat.TEXT
    column: str = Field(DEFAULT_COLUMN, description="Field of JSONL or column of Parquet that holds the documents.")
    sha256: str | None = Field(None, description="Of the stored file; null: built in, or not known yet.")
    created_at: str | None = None


class DatasetList(BaseModel):
    object: Literal["list"] = "list"
    data: list[DatasetAnswer]
    has_more: bool = False


class KeyAnswer(BaseModel):
    id: str
    name: str
    role: Literal["viewer", "submitter", "admin"]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None


class KeyList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyAnswer]
    has_more: bool = False


def at(moment: datetime | None) -> str | None:
    return None if moment is None else timestamp(moment)


def job_answer(job: Job) -> JobAnswer:
    """Show a row as REST does, without what only the view of one job has."""
    needs = decode_needs(job.needs)
    num_nodes = needs.num_nodes
    return JobAnswer(
        id=job.id,
        kind=job.kind,
        name=job.name,
        queue=job.queue,
        priority=job.priority,
        labels=job.labels,
        state=job.state,
        reason=job.reason,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        created_at=timestamp(job.created_at),
        claimed_at=at(job.claimed_at),
        finished_at=at(job.finished_at),
        cancel_requested_at=at(job.cancel_requested_at),
        last_seq=job.last_seq,
        step=job.step,
        num_steps=job.num_steps,
        progress=_progress(job),
        result=job.result,
        error=job.error,
        spec=_spec(job),
        schedule_id=job.schedule_id,
        num_preemptions=job.num_preemptions,
        sweep_id=job.sweep_id,
        notes=job.notes,
        num_gpus=None if needs.gpus is None else needs.gpus * num_nodes,
        num_ranks=needs.num_ranks * num_nodes if job.kind == "train" else None,
    )


def is_user_script(spec: Mapping[str, Any]) -> bool:
    """Return whether a job runs a user script, of which the service knows what it reports and no more."""
    return bool(spec.get("kind") == "train" and spec.get("entry_point") != BUILTIN_ENTRY_POINT)


def measured(value: Number | None) -> Number | None:
    """Return a speed, or None for the 0 of a script that measures none."""
    return None if value == 0 else value


def _progress(job: Job) -> dict[str, Any] | None:
    if job.progress is None or "tokens_per_s" not in job.progress:
        return job.progress
    return {**job.progress, "tokens_per_s": measured(job.progress["tokens_per_s"])}


def _spec(job: Job) -> dict[str, Any]:
    """As it was submitted; no model where nobody gave one."""
    if is_user_script(job.spec) and job.spec.get("model") == DEFAULT_MODEL_CONFIG:
        return {**job.spec, "model": None}
    return job.spec


def job_json(job: Job) -> dict[str, Any]:
    return job_answer(job).model_dump(mode="json")


def attempt_answers(attempts: Sequence[Attempt]) -> list[AttemptAnswer]:
    return [
        AttemptAnswer(
            attempt=row.attempt,
            worker=row.worker,
            started_at=timestamp(row.started_at),
            ended_at=at(row.ended_at),
            outcome=row.outcome,
            reason=row.reason,
            resumed_from_step=row.resumed_from_step,
            last_step=row.last_step,
            steps_lost=_steps_lost(row, following),
            facts=None if row.facts is None else AttemptFacts.model_validate(row.facts),
        )
        for row, following in zip_longest(attempts, attempts[1:])
    ]


def _steps_lost(attempt: Attempt, following: Attempt | None) -> int | None:
    if attempt.last_step is None or following is None or following.resumed_from_step is None:
        return None
    return max(attempt.last_step - following.resumed_from_step, 0)


def checkpoint_answer(row: Checkpoint) -> CheckpointAnswer:
    return CheckpointAnswer(
        id=row.id,
        job_id=row.job_id,
        filename=row.filename,
        epoch=row.epoch,
        global_step=row.step,
        val_loss=row.val_loss,
        train_loss=row.train_loss,
        file_size_mb=round(row.size_bytes / 1e6, 3),
        size_bytes=row.size_bytes,
        is_best=row.is_best,
        created_at=timestamp(row.created_at),
    )
