"""The tables. A row of `jobs` is the truth about its job; all else in the service is a copy or a history."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, LargeBinary, MetaData, String, desc, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from apt_jobs.db.clock import UtcDateTime, now_plus
from apt_jobs.db.documents import DOCUMENT, LABELS, Words
from apt_jobs.jobs.states import JobState

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
ROLES = ("viewer", "submitter", "admin")
OVERLAPS = ("skip", "queue", "cancel")
CATCH_UPS = ("skip", "latest", "all")
RUN_OUTCOMES = ("submitted", "skipped", "missed", "refused")


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map = {datetime: UtcDateTime(), dict[str, Any]: DOCUMENT}


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_one_of("state", tuple(state.value for state in JobState)), name="state"),
        CheckConstraint("(state IN ('running', 'pausing')) = (lease_until IS NOT NULL)", name="lease"),
        CheckConstraint("attempt >= 0 AND last_seq >= 0", name="counts"),
        Index("ix_jobs_waiting", "queue", "state", "holds", desc("priority"), "created_at", "id"),  # order of claims
        # See db/placements.py.
        Index("ix_jobs_needs", "queue", "state", "holds", "needs", desc("priority"), "created_at", "id"),
        # One range of an index for each filter of the list, in the list's order; see db/listing.py.
        Index("ix_jobs_by_kind", "state", "kind", "id"),
        Index("ix_jobs_by_queue", "state", "queue", "kind", "id"),
        # What a text or a label is looked for in: without the rows, which are a hundred times as large.
        Index("ix_jobs_search", "id", "name", "labels", "state", "kind", "queue").ddl_if(dialect="sqlite"),
        Index("ix_jobs_text", "id", "name", "state", "kind", "queue").ddl_if(dialect="postgresql"),
        Index("ix_jobs_labels", "labels", postgresql_using="gin", postgresql_ops={"labels": "jsonb_path_ops"}).ddl_if(
            dialect="postgresql"
        ),
        Index("ix_jobs_schedule_id", "schedule_id", "state"),
        Index("ix_jobs_code_sha256", "code_sha256"),
        Index("ix_jobs_sweep_id", "sweep_id", "state"),
        Index("ix_jobs_finished_at", "finished_at", "id"),  # what retention looks at, the oldest first
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    name: Mapped[str | None] = mapped_column(String(200))
    queue: Mapped[str] = mapped_column(String(100))
    priority: Mapped[int] = mapped_column(default=0)
    labels: Mapped[dict[str, str]] = mapped_column(LABELS)
    spec: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None] = mapped_column(Words)
    attempt: Mapped[int] = mapped_column(default=0)  # the fencing token
    max_attempts: Mapped[int]
    num_job_faults: Mapped[int] = mapped_column(default=0)  # see jobs/retry.py
    num_job_faults_without_checkpoint: Mapped[int] = mapped_column(default=0)  # in a row
    num_infrastructure_faults: Mapped[int] = mapped_column(default=0, server_default="0")  # the same
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    not_before_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    claimed_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    dispatched_at: Mapped[datetime | None]
    num_dispatches: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    last_seq: Mapped[int] = mapped_column(BigInteger, default=0)
    step: Mapped[int | None] = mapped_column(BigInteger)
    num_steps: Mapped[int | None] = mapped_column(BigInteger)
    progress: Mapped[dict[str, Any] | None] = mapped_column(DOCUMENT)
    result: Mapped[dict[str, Any] | None] = mapped_column(DOCUMENT)
    error: Mapped[dict[str, Any] | None] = mapped_column(DOCUMENT)
    idempotency_key: Mapped[str | None] = mapped_column(String(255), unique=True)  # of an imported run
    schedule_id: Mapped[str | None] = mapped_column(String(40))  # who made it; that schedule may be gone
    dataset_sha256: Mapped[str | None] = mapped_column(String(64))  # that its first attempt found; see dataset_pins.py
    code_sha256: Mapped[str | None] = mapped_column(String(64))  # of the code that it brings
    needs: Mapped[str] = mapped_column(String(300), default="", server_default="")  # jobs/needs.py
    reserved_by: Mapped[str | None] = mapped_column(String(200))  # worker that keeps room for it
    reserved_until: Mapped[datetime | None]
    is_preemptible: Mapped[bool] = mapped_column(default=False, server_default=false())  # jobs/preemption.py
    preempted_by: Mapped[str | None] = mapped_column(String(40))  # job that its attempt yields to
    num_preemptions: Mapped[int] = mapped_column(default=0, server_default="0")
    sweep_id: Mapped[str | None] = mapped_column(String(40))  # who made it
    notes: Mapped[str | None] = mapped_column(Words)  # of users; see db/job_edits.py
    holds: Mapped[int] = mapped_column(default=0, server_default="0")  # db/holds.py; claimed at 0 only


class JobParent(Base):
    """That a job comes after another one."""

    __tablename__ = "job_parents"
    __table_args__ = (Index("ix_job_parents_parent_id", "parent_id"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    parent_id: Mapped[str] = mapped_column(String(40), primary_key=True)  # it may be deleted when it has ended
    on_end: Mapped[bool]  # any end of the parent will do, not only success


class Attempt(Base):
    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str] = mapped_column(String(200))
    started_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(20))  # the state that the job left for
    reason: Mapped[str | None] = mapped_column(Words)
    resumed_from_step: Mapped[int | None] = mapped_column(BigInteger)
    last_step: Mapped[int | None] = mapped_column(BigInteger)
    facts: Mapped[dict[str, Any] | None]  # what it ran with: see jobs/attempt_facts.py


class EventRow(Base):
    __tablename__ = "events"
    __table_args__ = (Index("ix_events_history", "job_id", "kind", "step"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int]
    kind: Mapped[str] = mapped_column(String(40))
    step: Mapped[int | None] = mapped_column(BigInteger)
    at: Mapped[datetime]
    payload: Mapped[bytes] = mapped_column(LargeBinary)  # JSON of `codec.encode_payload`


class EventChunk(Base):
    """Events of one kind that one attempt stored in one transaction, as columns instead of rows of `events`."""

    __tablename__ = "event_chunks"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(40), primary_key=True)
    last_seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    first_seq: Mapped[int] = mapped_column(BigInteger)  # events of other kinds lie in between
    attempt: Mapped[int]
    body: Mapped[bytes] = mapped_column(LargeBinary)  # `columns.encode_columns`


class SeriesSegment(Base):
    """A part of one attempt in which steps only grow: a roll-back begins the next one."""

    __tablename__ = "series_segments"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(40), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    segment: Mapped[int] = mapped_column(primary_key=True)  # 0 is the attempt's first
    num_columns: Mapped[int]
    num_steps: Mapped[int] = mapped_column(BigInteger)
    first_step: Mapped[int] = mapped_column(BigInteger)
    last_step: Mapped[int] = mapped_column(BigInteger)
    first_seq: Mapped[int] = mapped_column(BigInteger)
    last_seq: Mapped[int] = mapped_column(BigInteger)
    open_seq: Mapped[int] = mapped_column(BigInteger)  # steps from here on are in no row of `series_levels` yet


class SeriesLevel(Base):
    """`FACTOR` buckets of `FACTOR ** level` steps each (db/series/store.py). Written once, when the last is full."""

    __tablename__ = "series_levels"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(40), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    segment: Mapped[int] = mapped_column(primary_key=True)
    level: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)  # its place in the segment, from 0
    first_step: Mapped[int] = mapped_column(BigInteger)
    last_step: Mapped[int] = mapped_column(BigInteger)
    first_seq: Mapped[int] = mapped_column(BigInteger)
    last_seq: Mapped[int] = mapped_column(BigInteger)
    body: Mapped[bytes] = mapped_column(LargeBinary)  # `Summary.encode`


class Checkpoint(Base):
    __tablename__ = "checkpoints"
    __table_args__ = (
        Index("ix_checkpoints_job_id_step", "job_id", "step"),
        Index("ix_checkpoints_created_at", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    filename: Mapped[str] = mapped_column(String(300), unique=True)  # folder below the checkpoints directory
    step: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[int]
    val_loss: Mapped[float | None]
    train_loss: Mapped[float | None]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    is_best: Mapped[bool]
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))


class WorkerRow(Base):
    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    queues: Mapped[list[str]] = mapped_column(DOCUMENT)
    hostname: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int]
    version: Mapped[str] = mapped_column(String(50))
    gpus: Mapped[list[dict[str, Any]]] = mapped_column(DOCUMENT)
    started_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    heartbeat_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    current_job_id: Mapped[str | None] = mapped_column(String(40))  # the first of several
    room: Mapped[dict[str, Any] | None] = mapped_column(DOCUMENT)  # jobs/packing.py; None: it does not pack jobs
    drain_requested_at: Mapped[datetime | None]
    entry_points: Mapped[list[str] | None] = mapped_column(DOCUMENT)  # names; None: it does not say
    warm_models: Mapped[list[str] | None] = mapped_column(DOCUMENT)  # ids of those in its memory; None: it does not say
    num_hand_backs: Mapped[int] = mapped_column(default=0, server_default="0")  # in a row
    paused_until_at: Mapped[datetime | None]  # it claims nothing before
    paused_reason: Mapped[str | None] = mapped_column(Words)
    pool: Mapped[str | None] = mapped_column(String(100))  # of nodes that it belongs to, or leads; see db/gangs.py


class GangShare(Base):
    """A node of a pool that takes part in an attempt. The primary key is the promise that it does so in one."""

    __tablename__ = "gang_shares"
    __table_args__ = (Index("ix_gang_shares_job_id", "job_id"),)

    worker: Mapped[str] = mapped_column(String(200), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    node_rank: Mapped[int]


class HandBack(Base):
    """A job that a worker handed back for what that worker lacks. Forgotten when an attempt of the job gets further."""

    __tablename__ = "hand_backs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    worker: Mapped[str] = mapped_column(String(200), primary_key=True)
    reason: Mapped[str] = mapped_column(Words)
    num_times: Mapped[int]
    until_at: Mapped[datetime]  # the job is kept off the worker until then


class QueueRow(Base):
    """A queue that somebody configured; others have no row."""

    __tablename__ = "queues"
    __table_args__ = (CheckConstraint("max_running > 0", name="max_running"),)

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    max_running: Mapped[int | None]
    paused_at: Mapped[datetime | None]


class Schedule(Base):
    __tablename__ = "schedules"
    __table_args__ = (
        CheckConstraint(_one_of("overlap", OVERLAPS), name="overlap"),
        CheckConstraint(_one_of("catch_up", CATCH_UPS), name="catch_up"),
        Index("ix_schedules_next_due_at", "next_due_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    cron: Mapped[str] = mapped_column(String(200))
    time_zone: Mapped[str] = mapped_column(String(100))
    spec: Mapped[dict[str, Any]]
    overlap: Mapped[str] = mapped_column(String(20))
    catch_up: Mapped[str] = mapped_column(String(20))
    paused_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    next_due_at: Mapped[datetime | None]  # None: never again


class ScheduleRun(Base):
    """What became of one due time. The primary key is the promise that none fires twice."""

    __tablename__ = "schedule_runs"
    __table_args__ = (CheckConstraint(_one_of("outcome", RUN_OUTCOMES), name="outcome"),)

    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id", ondelete="CASCADE"), primary_key=True)
    due_at: Mapped[datetime] = mapped_column(primary_key=True)
    fired_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    outcome: Mapped[str] = mapped_column(String(20))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    reason: Mapped[str | None] = mapped_column(Words)


class ApiKey(Base):
    __tablename__ = "api_keys"
    __table_args__ = (CheckConstraint(_one_of("role", ROLES), name="role"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    role: Mapped[str] = mapped_column(String(20))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # to about a minute


class Secret(Base):
    """A value that jobs are given by name."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    encrypted: Mapped[str]  # by a key that is not in the database: see operations/secrets.py
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    updated_at: Mapped[datetime] = mapped_column(default=now_plus(0))


class IdempotencyKeyRow(Base):
    """What an `Idempotency-Key` made. The primary key is the promise that it makes one thing."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_created_at", "created_at"),)

    owner: Mapped[str] = mapped_column(String(100), primary_key=True)
    route: Mapped[str] = mapped_column(String(300), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    resource_id: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))


class LoginToken(Base):
    __tablename__ = "login_tokens"
    __table_args__ = (CheckConstraint(_one_of("role", ROLES), name="role"),)

    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(20))
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class BrowserSession(Base):
    __tablename__ = "browser_sessions"
    __table_args__ = (CheckConstraint(_one_of("role", ROLES), name="role"),)

    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(20))
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    expires_at: Mapped[datetime]


class ServiceValue(Base):
    __tablename__ = "service_values"

    key: Mapped[str] = mapped_column(String(100), primary_key=True)
    value: Mapped[str]
