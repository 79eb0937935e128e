"""Data sets of a job besides the one that it trains on: further ones with weights, and those to evaluate on by name."""

from typing import Annotated

from pydantic import Field, StringConstraints

from apt_jobs.jobs.strict_model import Strict

MAX_MIXED = 64
MAX_EVALUATED = 16
DatasetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class WeightedDataset(Strict):
    """A data set of a mixture."""

    name: DatasetName = Field(description="A data set of `GET /api/datasets`.")
    weight: float = Field(
        1.0, gt=0.0, le=1e9, description="Its share of the sequences is this over the sum of all weights."
    )


def shares_of(datasets: list[WeightedDataset]) -> list[float]:
    """Return the share of each data set; they add up to 1."""
    total = sum(one.weight for one in datasets)
    return [one.weight / total for one in datasets]
