"""Histories as answers: curves as JSON, gradient norms of many layers as JSON or in a compact binary form.

docs/explanation/histories.md has the layout of the binary form. Min, max and mean of a bucket are the upper 16 bits of
a float32 (min rounded down, max up), which a browser turns into floats without parsing; single steps are whole float32.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from apt_jobs.db.series.histories import GradientOverview, TrainingHistory, layer_statistics, shown_values
from apt_jobs.db.series.store import CURVES
from apt_jobs.db.series.summaries import Summary
from apt_jobs.events.codec import Number, finite_or_name
from apt_jobs.web.schemas import measured

VERSION = 1
MEDIA_TYPE = "application/vnd.apt-jobs.overview"
MAX_OVERVIEW_BYTES = 175_000  # of the numbers, if the client does not say how many points it wants
MIN_POINTS, MAX_POINTS = 50, 1_000
_HEADER = struct.Struct("<6I")  # version, layers, buckets, bytes of a value, bytes of the JSON at the end, zero
_BYTES_PER_VALUE = 3 * 2 + 2 / 8  # min, max, mean; anomalous or not, finite or not


class CurveExtremes(BaseModel):
    """Min and max of each point of a curve, and how many of its values were not finite."""

    min: list[Number | None]
    max: list[Number | None]
    num_nonfinite: list[int]


class TrainingCurves(BaseModel):
    """Curves by step. A value that is not finite is "NaN", "Infinity" or "-Infinity".

    A point stands for one step, or for several: then it is at the last of them and has their mean, or "NaN" if one of
    them was not finite, and `extremes` has the rest.
    """

    steps: list[int]
    train_loss: list[Number]
    learning_rate: list[Number]
    grad_norm: list[Number]
    step_time_ms: list[Number]
    tokens_per_s: list[Number | None] = Field(description="null: nobody measured it.")
    val_steps: list[int]
    val_loss: list[Number]
    num_steps_recorded: int
    first_steps: list[int] = Field(description="Of each point.")
    extremes: dict[str, CurveExtremes] = Field(description="By curve; empty if every point is one step.")


class GradientOverviewAnswer(BaseModel):
    """Norms by point and layer, in the order of `names`. A value is null if no norm of the point was finite."""

    names: list[str]
    first_steps: list[int]
    last_steps: list[int]
    num_steps: list[int]
    min: list[list[float | None]]
    max: list[list[float | None]]
    mean: list[list[float | None]]
    anomalous: list[list[int]] = Field(description="Of each point, indexes of the layers that were anomalous.")
    nonfinite: list[list[int]] = Field(
        description="Of each point, indexes of the layers with a norm that is not finite."
    )
    layer_statistics: dict[str, dict[str, Any]] = Field(description="Over all steps, whatever the range.")
    anomaly_summary: dict[str, int]
    total_steps: int


def training_curves(history: TrainingHistory) -> TrainingCurves:
    points, validations = history.points, history.validations
    has_buckets = bool((points.num_steps_B > 1).any() or (validations.num_steps_B > 1).any())
    extremes = {name: _extremes(points, index) for index, name in enumerate(CURVES)} if has_buckets else {}
    if has_buckets:
        extremes["val_loss"] = _extremes(validations, 0)
    curves = {name: _named(shown_values(points, index)) for index, name in enumerate(CURVES)}
    tokens_per_s = [measured(value) for value in curves.pop("tokens_per_s")]
    return TrainingCurves(
        steps=points.last_steps_B.tolist(),
        **curves,
        tokens_per_s=tokens_per_s,
        val_steps=validations.last_steps_B.tolist(),
        val_loss=_named(shown_values(validations, 0)),
        num_steps_recorded=history.num_steps_recorded,
        first_steps=points.first_steps_B.tolist(),
        extremes=extremes,
    )


def points_that_fit(num_layers: int) -> int:
    """Return how many points of so many layers fit into `MAX_OVERVIEW_BYTES`, at least `MIN_POINTS`."""
    fitting = int(MAX_OVERVIEW_BYTES / (_BYTES_PER_VALUE * num_layers + 20))
    return min(max(fitting, MIN_POINTS), MAX_POINTS)


def overview_answer(overview: GradientOverview) -> dict[str, Any]:
    """`GradientOverviewAnswer` as JSON."""
    points = overview.points
    return {
        "names": overview.names,
        "first_steps": points.first_steps_B.tolist(),
        "last_steps": points.last_steps_B.tolist(),
        "num_steps": points.num_steps_B.tolist(),
        "min": points.min_BL.tolist(),  # orjson writes NaN as null
        "max": points.max_BL.tolist(),
        "mean": np.where(np.isfinite(points.mean_BL), points.mean_BL, np.nan).tolist(),
        "anomalous": [np.flatnonzero(row).tolist() for row in points.num_anomalous_BL],
        "nonfinite": [np.flatnonzero(row).tolist() for row in points.num_nonfinite_BL],
        "layer_statistics": layer_statistics(overview),
        "anomaly_summary": overview.anomaly_counts,
        "total_steps": overview.of_all_steps.num_steps,
    }


def overview_bytes(overview: GradientOverview) -> bytes:
    """Return the binary form."""
    points = overview.points
    is_single = not (points.num_steps_B > 1).any()
    statistics = layer_statistics(overview)
    rest = orjson.dumps(
        {
            "names": overview.names,
            "layer_statistics": {
                key: [_short(of_layer[key]) for of_layer in statistics.values()]
                for key in ("mean", "std", "min", "max", "anomaly_count")
            },
            "anomaly_summary": overview.anomaly_counts,
            "total_steps": overview.of_all_steps.num_steps,
        }
    )
    values = (
        [points.mean_BL.astype("<f4")]
        if is_single
        else [_half(points.min_BL, 0), _half(points.max_BL, 0xFFFF), _half(points.mean_BL, 0x8000)]
    )
    size = 4 if is_single else 2
    parts = [
        _HEADER.pack(VERSION, len(overview.names), points.num_buckets, size, len(rest), 0),
        points.first_steps_B.astype("<f8").tobytes(),
        points.last_steps_B.astype("<f8").tobytes(),
        points.num_steps_B.astype("<u4").tobytes(),
        *(column.tobytes() for column in values),
        np.packbits(points.num_anomalous_BL > 0, bitorder="little").tobytes(),
        np.packbits(points.num_nonfinite_BL > 0, bitorder="little").tobytes(),
        rest,
    ]
    return b"".join(parts)


def _half(values: NDArray[Any], added: int) -> NDArray[np.uint16]:
    """Return the upper half of each float32: `added` 0 rounds a norm down, 0x8000 to the nearest, 0xFFFF up."""
    with np.errstate(over="ignore"):
        bits = values.astype("<f4").view("<u4")
    is_finite = bits & 0x7F800000 != 0x7F800000
    return ((bits + np.where(is_finite, added, 0).astype(np.uint32)) >> 16).astype("<u2")


def _extremes(points: Summary, column: int) -> CurveExtremes:
    return CurveExtremes(
        min=_nullable(points.min_BL[:, column]),
        max=_nullable(points.max_BL[:, column]),
        num_nonfinite=points.num_nonfinite_BL[:, column].tolist(),
    )


def _nullable(values: NDArray[Any]) -> list[Number | None]:
    return [None if value != value else value for value in values.tolist()]


def _named(values: Sequence[float]) -> list[Number]:
    return [finite_or_name(value) for value in values]


def _short(value: Any) -> Any:
    """Return a number with the digits that somebody reads."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
