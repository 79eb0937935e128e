"""Running statistics of every layer's gradient norm: one vectorised update a step, whatever the number of layers.

Shapes: L layers. Mean and variance are Welford's (1962), over finite norms; broken ones count as steps and anomalies.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]


class LayerStatistics:
    """Of `num_layers` layers, by their index."""

    def __init__(self, num_layers: int) -> None:
        self._num_finite: Counts = np.zeros(num_layers, np.int64)
        self._mean: Floats = np.zeros(num_layers)
        self._sum_squares: Floats = np.zeros(num_layers)  # of differences from the mean
        self._least: Floats = np.full(num_layers, math.inf)
        self._most: Floats = np.full(num_layers, -math.inf)
        self._total_steps: Counts = np.zeros(num_layers, np.int64)
        self._anomaly_count: Counts = np.zeros(num_layers, np.int64)

    def add(self, norms_L: Floats, anomalous_L: Flags) -> None:
        """Count one step."""
        self._total_steps += 1
        self._anomaly_count += anomalous_L
        finite = np.isfinite(norms_L)
        known = norms_L if finite.all() else np.where(finite, norms_L, self._mean)
        self._num_finite += finite
        delta = known - self._mean
        self._mean += delta / np.maximum(self._num_finite, 1)
        self._sum_squares += delta * (known - self._mean)
        np.minimum(self._least, known, out=self._least, where=finite)
        np.maximum(self._most, known, out=self._most, where=finite)

    def grow(self, num_layers: int) -> None:
        """Make room for layers that came later; they begin at zero."""
        fresh = LayerStatistics(num_layers - len(self._mean))
        for name, values in vars(fresh).items():
            setattr(self, name, np.concatenate([getattr(self, name), values]))

    def export(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """SPEC S1's `layer_statistics`."""
        return {name: self._export(index) for index, name in enumerate(names)}

    def rows(self) -> list[list[Any]]:
        """Return all there is, as JSON values: one list a layer."""
        return [
            [
                *(int(self._num_finite[index]), float(self._mean[index]), float(self._sum_squares[index])),
                *(_or_none(float(self._least[index])), _or_none(float(self._most[index]))),
                *(int(self._total_steps[index]), int(self._anomaly_count[index])),
            ]
            for index in range(len(self._mean))
        ]

    def load_row(self, index: int, row: Sequence[Any]) -> None:
        """Inverse of one list of `rows`."""
        num_finite, mean, sum_squares, least, most, total_steps, anomaly_count = row
        self._num_finite[index], self._mean[index], self._sum_squares[index] = num_finite, mean, sum_squares
        self._least[index] = math.inf if least is None else least
        self._most[index] = -math.inf if most is None else most
        self._total_steps[index], self._anomaly_count[index] = total_steps, anomaly_count

    def _export(self, index: int) -> dict[str, Any]:
        num_finite = int(self._num_finite[index])
        known = num_finite > 0
        return {
            "mean": float(self._mean[index]) if known else None,
            "std": math.sqrt(float(self._sum_squares[index]) / num_finite) if known else None,
            "min": float(self._least[index]) if known else None,
            "max": float(self._most[index]) if known else None,
            "total_steps": int(self._total_steps[index]),
            "anomaly_count": int(self._anomaly_count[index]),
        }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
