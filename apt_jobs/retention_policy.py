"""What is kept and for how long. Nothing is removed unless a policy says so."""

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_DAYS = 36_500.0
FOREVER = 0.0  # of a label


class RetentionPolicy(BaseModel):
    """Which ended jobs are removed, and what of those that are kept. A field that is null removes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    days: float | None = Field(None, gt=0, le=MAX_DAYS, description="Ended jobs are kept for so many days.")
    label_days: dict[str, float] = Field(
        default_factory=dict,
        max_length=100,
        description='Days for jobs with a label instead, as {"run=smoke": 7}; 0: for good, whatever else is set.',
    )
    max_jobs: int | None = Field(None, ge=0, description="So many ended jobs are kept; the oldest go first.")
    max_bytes: int | None = Field(
        None, ge=0, description="Checkpoints of ended jobs have so many bytes together; the oldest jobs go first."
    )
    checkpoint_days: float | None = Field(
        None, gt=0, le=MAX_DAYS, description="Then a job that has ended keeps its best checkpoint only, or its last."
    )
    run_days: float | None = Field(
        None, gt=0, le=MAX_DAYS, description="Then the run folder of an ended job goes, with all that it wrote there."
    )
    log_days: float | None = Field(
        None, gt=0, le=MAX_DAYS, description="Then the text of its log lines goes, but for warnings and errors."
    )
    worker_days: float | None = Field(
        None, gt=0, le=MAX_DAYS, description="Workers that were not heard of for so long are forgotten."
    )
    key_days: float | None = Field(
        None, gt=0, le=MAX_DAYS, description="API keys that ended so long ago are forgotten."
    )

    @field_validator("label_days")
    @classmethod
    def _labels_are_labels(cls, label_days: dict[str, float]) -> dict[str, float]:
        for label, days in label_days.items():
            if not all(label.partition("=")[::2]):
                raise ValueError(f"{label!r} is no label; write it as team=a")
            if not 0 <= days <= MAX_DAYS:
                raise ValueError(f"{label!r} has {days} days; expected 0 (for good) to {MAX_DAYS:,.0f}")
        return label_days

    @property
    def removes_jobs(self) -> bool:
        """Whether it can remove a job at all."""
        has_days = self.days is not None or any(self.label_days.values())
        return has_days or self.max_jobs is not None or self.max_bytes is not None

    @property
    def least_days(self) -> float:
        """How long a job is kept at least, as far as days are concerned; infinite: they remove none."""
        return min((days for days in (self.days, *self.label_days.values()) if days), default=math.inf)

    def days_of(self, labels: Mapping[str, str]) -> float | None:
        """Return for how many days a job with these labels is kept; None: as long as number and size allow.

        Infinite: for good. Of several labels the longest time counts.
        """
        found = [
            days if days != FOREVER else math.inf
            for label, days in self.label_days.items()
            if labels.get(label.partition("=")[0]) == label.partition("=")[2]
        ]
        return max(found) if found else self.days
