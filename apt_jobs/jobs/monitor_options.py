"""What a job says of its gradient monitor: thresholds, and what it does by itself about incidents."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from apt_jobs.jobs.strict_model import Strict

IncidentKind = Literal[
    "nan", "inf", "exploding", "vanishing", "spike", "vanished", "rank_outlier", "straggler", "desync", "update_spike"
]
PolicyAction = Literal["warn", "checkpoint", "pause", "rollback", "skip_batches", "cut_lr", "cancel"]


class AnomalyPolicy(Strict):
    """What to do by itself when an incident of one of these kinds is open."""

    kinds: list[IncidentKind] = Field(min_length=1, max_length=16, description="Kinds of incident that it answers.")
    action: PolicyAction = Field(
        description="checkpoint: save; pause: save and wait for a user; rollback: go back to the checkpoint before the "
        "incident and skip the batches since; skip_batches: go on with later batches; cut_lr: multiply the learning "
        "rate by `factor`; cancel: end the job; warn: only say so."
    )
    layers: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        None, description="Only for layers like this pattern, as `model.layers.*`."
    )
    patience_steps: int = Field(1, ge=1, le=1_000_000, description="Steps on which the incident has to be seen.")
    max_times: int = Field(1, ge=1, le=1_000, description="At most so often in an attempt.")
    skip_steps: int = Field(50, ge=1, le=1_000_000, description="Further steps whose batches are skipped.")
    factor: float = Field(0.5, gt=0.0, lt=1.0, description="Of the learning rate, for `cut_lr`.")


class MonitorOptions(Strict):
    """The gradient monitor. Thresholds are norms of one layer's gradient."""

    vanishing_below: float = Field(1e-7, ge=0.0, description="A norm below this is vanishing.")
    exploding_above: float = Field(1e3, gt=0.0, description="A norm above this is exploding.")
    every_steps: int = Field(1, ge=1, le=1_000_000, description="Optimizer steps between two records.")
    rank_norms_every_steps: int = Field(
        10, ge=1, le=1_000_000, description="Steps between two stored records of every rank's layers."
    )
    window_steps: int = Field(128, ge=8, le=4_096, description="Records of which it is known what is usual.")
    arm_after_steps: int = Field(32, ge=4, le=4_096, description="Records of a layer before it is judged by them.")
    spike_ratio: float = Field(5.0, gt=1.0, description="A spike is at least so many times its forecast.")
    spike_mads: float = Field(
        8.0, gt=0.0, description="And so many usual errors of forecasts above it, in logs, more than its block is."
    )
    block_spike_mads: float = Field(10.0, gt=0.0, description="Or so many, whatever the rest of its block does.")
    vanished_ratio: float = Field(100.0, gt=1.0, description="Vanished: less than the median divided by this.")
    vanished_steps: int = Field(20, ge=1, description="For so many records in a row.")
    rank_ratio: float = Field(8.0, gt=1.0, description="A rank is an outlier at so many times the other ranks.")
    rank_mads: float = Field(10.0, gt=0.0, description="And so many deviations from where it usually is.")
    straggler_ratio: float = Field(
        1.3, gt=1.0, description="A straggler computes so many times as long as others, and 5 ms longer."
    )
    straggler_steps: int = Field(50, ge=5, le=4_096, description="For nearly so many records in a row.")
    quiet_steps: int = Field(20, ge=1, description="Records without it after which an incident is over.")
    on_anomaly: list[AnomalyPolicy] = Field(
        default_factory=list, max_length=16, description="What the job does by itself about incidents."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.vanishing_below >= self.exploding_above:
            raise ValueError(
                f"vanishing_below={self.vanishing_below} must be less than exploding_above={self.exploding_above}"
            )
        if self.arm_after_steps > self.window_steps:
            raise ValueError(
                f"arm_after_steps={self.arm_after_steps} must not be more than window_steps={self.window_steps}"
            )
        return self
