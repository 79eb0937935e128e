"""The tables of the `/v1` dialect: files, batches and fine-tunings. Each row belongs to the key that made it."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from apt_jobs.db.clock import now_plus
from apt_jobs.db.documents import DOCUMENT, Words
from apt_jobs.db.models import Base

BATCH_STATES = (
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
)
ACTIVE_BATCH_STATES = ("validating", "in_progress", "finalizing", "cancelling")


class FileRow(Base):
    """A file of `/v1/files`. The row is the commit point, its content lies in `artifacts/files.py`'s folder."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_owner", "owner", "id"), Index("ix_files_expires_at", "expires_at"))

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(100))
    filename: Mapped[str] = mapped_column(Words)
    purpose: Mapped[str] = mapped_column(String(40))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    expires_at: Mapped[datetime | None]


class Batch(Base):
    """Many requests of a file. Its loop (`web/openai/batch_loop.py`) makes a job of each, a window at a time."""

    __tablename__ = "batches"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(map(repr, BATCH_STATES))})", name="state"),
        Index("ix_batches_owner", "owner", "id"),
        Index("ix_batches_state", "state", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(100))
    endpoint: Mapped[str] = mapped_column(String(40))
    input_file_id: Mapped[str] = mapped_column(String(40))
    output_file_id: Mapped[str | None] = mapped_column(String(40))
    error_file_id: Mapped[str | None] = mapped_column(String(40))
    completion_window: Mapped[str] = mapped_column(String(20))
    output_lifetime_s: Mapped[int | None]  # of the files that it makes; None: until they are deleted
    notes: Mapped[dict[str, Any] | None] = mapped_column(DOCUMENT)  # `metadata` in the dialect
    state: Mapped[str] = mapped_column(String(20), default="validating")
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(DOCUMENT)  # why it failed
    num_requests: Mapped[int] = mapped_column(default=0)
    num_completed: Mapped[int] = mapped_column(default=0)
    num_failed: Mapped[int] = mapped_column(default=0)
    num_prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    num_completion_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    num_lines_read: Mapped[int] = mapped_column(default=0)  # of the file: those up to here are rows or done
    num_bytes_read: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    in_progress_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    expires_at: Mapped[datetime]
    expired_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]


class BatchRequest(Base):
    """A line of a batch that was read; gone when the batch's files are written."""

    __tablename__ = "batch_requests"
    __table_args__ = (Index("ix_batch_requests_open", "batch_id", "is_failed"),)

    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    custom_id: Mapped[str] = mapped_column(Words)
    model: Mapped[str] = mapped_column(Words)  # as the line named it
    job_id: Mapped[str | None] = mapped_column(String(40))  # None: no job was made of it
    is_failed: Mapped[bool | None]  # None: its job has not ended
    answer: Mapped[dict[str, Any] | None] = mapped_column(DOCUMENT)  # `response` and `error` of its line in a file


class FineTuning(Base):
    """A training job as `/v1/fine_tuning/jobs` shows it."""

    __tablename__ = "fine_tunings"
    __table_args__ = (Index("ix_fine_tunings_owner", "owner", "id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(100))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), unique=True)
    model: Mapped[str] = mapped_column(String(100))
    training_file_id: Mapped[str] = mapped_column(String(40))
    suffix: Mapped[str | None] = mapped_column(String(64))
    hyperparameters: Mapped[dict[str, Any]]
    notes: Mapped[dict[str, Any] | None] = mapped_column(DOCUMENT)  # `metadata` in the dialect
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
