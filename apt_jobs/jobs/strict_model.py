"""What every model of a job's request is: strict, so that nothing in it is guessed."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """No unknown fields, no silent conversion, no change after validation, no NaN or Infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
