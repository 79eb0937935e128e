"""The tables of sweeps: what was asked for, one row for each planned job, and what halving decided of them."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import Base


class Sweep(Base):
    """One sweep. `paused_at` and `cancel_requested_at` are what users want; `db/sweeps.py` brings its jobs there."""

    __tablename__ = "sweeps"
    __table_args__ = (
        CheckConstraint("max_running > 0 AND num_jobs > 0", name="counts"),
        Index("ix_sweeps_finished_at", "finished_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str | None] = mapped_column(String(200))
    request: Mapped[dict[str, Any]]  # as it was asked for: `SweepSpec`
    metric: Mapped[str] = mapped_column(String(200))
    goal: Mapped[str] = mapped_column(String(20))
    num_jobs: Mapped[int]
    max_running: Mapped[int | None]  # None: all at once
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    paused_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]  # None: some of its jobs have not ended


class SweepTrial(Base):
    """One planned job. The row and the job are inserted together; `job_id` stays when the job is deleted."""

    __tablename__ = "sweep_trials"
    __table_args__ = (Index("ix_sweep_trials_job_id", "job_id", unique=True),)

    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # of the setting, from 1
    repeat: Mapped[int] = mapped_column(primary_key=True)  # from 0
    job_id: Mapped[str] = mapped_column(String(40))
    setting: Mapped[dict[str, Any]]  # parameters by name
    is_paused: Mapped[bool] = mapped_column(default=False)  # with its sweep, so that it goes on with it


class SweepRung(Base):
    """What halving decided of a job at one rung. The primary key is the promise that it decides once."""

    __tablename__ = "sweep_rungs"

    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id", ondelete="CASCADE"), primary_key=True)
    rung: Mapped[int] = mapped_column(primary_key=True)  # from 0
    number: Mapped[int] = mapped_column(primary_key=True)  # of the trial
    step: Mapped[int] = mapped_column(BigInteger)
    value: Mapped[float | None]  # None: not finite
    is_promoted: Mapped[bool]
