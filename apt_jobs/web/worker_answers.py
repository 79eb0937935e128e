"""What REST says of workers and queues: the bodies of answers, and rows turned into them."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from apt_jobs.db.models import WorkerRow
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.packing import RoomReport


class WorkerJob(BaseModel):
    """A job that a worker runs, and what it has to itself."""

    id: str
    gpus: list[int] = Field(description="Indexes of its GPUs.")
    gpu_share: float = Field(1.0, description="Part of each of them that it has.")
    cpus: int = Field(description="CPU cores.")
    memory_gb: float = Field(description="Main memory that it asked for, in GB (10**9 bytes).")
    waiting_for: str | None = Field(None, description="Why Slurm has not started it; null: it has, or is not asked.")


class WorkerResources(BaseModel):
    """What a training worker offers to its jobs, and what of it is free."""

    gpus: int
    gpus_free: int = Field(description="That no job uses a part of.")
    cpus: int
    cpus_free: int
    memory_gb: float
    memory_gb_free: float
    max_jobs: int = Field(description="Most jobs at once.")
    kept_for: str | None = Field(None, description="Job that it keeps room for.")


class WorkerAnswer(BaseModel):
    name: str
    kind: str
    queues: list[str]
    hostname: str
    pid: int
    version: str
    gpus: list[dict[str, Any]]
    started_at: str
    heartbeat_at: str
    current_job_id: str | None = Field(description="The first of `jobs`, or of what a generation worker serves.")
    jobs: list[WorkerJob] = Field(default_factory=list, description="What a training worker runs; empty of others.")
    resources: WorkerResources | None = Field(None, description="null: not a training worker.")
    alive: bool
    drained: bool = Field(description="Somebody asked it to claim no jobs.")
    paused_reason: str | None = Field(
        None, description="Why it claims nothing for now: what it lacks. It looks again by itself, or on resume."
    )


class QueueAnswer(BaseModel):
    name: str
    queued: int
    running: int
    num_workers: int
    max_running: int | None = Field(description="Most jobs of the queue that run at once; null: no limit.")
    paused: bool


class QueueList(BaseModel):
    object: Literal["list"] = "list"
    data: list[QueueAnswer]
    has_more: bool = False


class WorkerList(BaseModel):
    object: Literal["list"] = "list"
    data: list[WorkerAnswer]
    has_more: bool = False


def _resources_answer(row: WorkerRow) -> WorkerResources | None:
    if row.room is None:
        return None
    room = RoomReport.of_document(row.room).room(row.gpus)
    return WorkerResources(
        gpus=len(room.offer.gpus),
        gpus_free=len(room.free_gpus),
        cpus=room.offer.cpus,
        cpus_free=room.free_cpus,
        memory_gb=room.offer.memory_gb,
        memory_gb_free=round(room.free_memory_gb, 3),
        max_jobs=room.offer.max_jobs,
        kept_for=row.room["kept_for"],
    )


def worker_answer(row: WorkerRow, *, alive: bool, paused_reason: str | None) -> WorkerAnswer:
    jobs = [] if row.room is None else row.room["jobs"]
    return WorkerAnswer(
        name=row.name,
        kind=row.kind,
        queues=row.queues,
        hostname=row.hostname,
        pid=row.pid,
        version=row.version,
        gpus=row.gpus,
        started_at=timestamp(row.started_at),
        heartbeat_at=timestamp(row.heartbeat_at),
        current_job_id=row.current_job_id,
        jobs=[WorkerJob.model_validate(job) for job in jobs],
        resources=_resources_answer(row),
        alive=alive,
        drained=row.drain_requested_at is not None,
        paused_reason=paused_reason,
    )
