"""What a job says of some of its parameters, by patterns of their names."""

from typing import Annotated

from pydantic import Field, StringConstraints

from apt_jobs.jobs.strict_model import Strict

ParameterPattern = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,200}$")]


class ParameterGroup(Strict):
    """Parameters that are trained otherwise than the rest."""

    pattern: ParameterPattern = Field(description="Of their names, as `model.embed_tokens.*` or `*.layers.[0-3].*`.")
    learning_rate_factor: float = Field(1.0, ge=0.0, le=1_000.0, description="Their rate, relative to the schedule's.")
    weight_decay: float | None = Field(
        None, ge=0.0, le=10.0, description="Their decay, norms and biases included; null: as the others'."
    )
