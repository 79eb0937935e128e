"""Summarise neighbouring steps in buckets: min, max, mean and std of each column, and what was wrong in them.

Buckets can be merged into larger ones without their steps, so a history is kept at rollup levels and read at any
of them. Values that are not finite are counted, and stay out of everything else. Legend: B buckets, L columns (layers
of the model, or curves).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from apt_jobs.errors import InvalidInput
from apt_jobs.events.columns import pack_floats, pack_integers, unpack

VERSION = 1
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of each bucket. `mean_BL` of a bucket with one step is its value, even if that is not finite."""

    first_steps_B: Integers
    last_steps_B: Integers
    num_steps_B: Integers
    last_at_ms_B: Integers  # when its last step was, Unix ms
    anomalous_steps_B: Integers  # the first step on which something was anomalous; -1: none was
    min_BL: Floats  # NaN in all four: no value was finite
    max_BL: Floats
    mean_BL: Floats
    std_BL: Floats  # population standard deviation
    num_nonfinite_BL: Integers  # values that are not finite
    num_anomalous_BL: Integers

    @classmethod
    def of_steps(cls, steps_B: Integers, at_ms_B: Integers, values_BL: Floats, anomalous_BL: NDArray[np.bool_]) -> Self:
        """Make one bucket a step."""
        values_BL = values_BL.astype(np.float64)
        finite_BL = np.isfinite(values_BL)
        known_BL = np.where(finite_BL, values_BL, np.nan)
        return cls(
            first_steps_B=steps_B,
            last_steps_B=steps_B,
            num_steps_B=np.ones_like(steps_B),
            last_at_ms_B=at_ms_B,
            anomalous_steps_B=np.where(anomalous_BL.any(axis=1), steps_B, -1),
            min_BL=known_BL,
            max_BL=known_BL,
            mean_BL=values_BL,
            std_BL=np.where(finite_BL, 0.0, np.nan),
            num_nonfinite_BL=(~finite_BL).astype(np.int64),
            num_anomalous_BL=anomalous_BL.astype(np.int64),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Self], num_columns: int) -> Self:
        """Concatenate the buckets of all parts, in order. Other widths are cut, or padded with unknown columns."""
        parts = [part.with_width(num_columns) for part in parts] or [cls.empty(num_columns)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    @classmethod
    def empty(cls, num_columns: int) -> Self:
        """Return a summary without buckets."""
        empty_BL = np.zeros((0, num_columns))
        return cls.of_steps(np.zeros(0, np.int64), np.zeros(0, np.int64), empty_BL, empty_BL.astype(bool))

    @property
    def num_buckets(self) -> int:
        return len(self.num_steps_B)

    @property
    def num_steps(self) -> int:
        return int(self.num_steps_B.sum())

    @property
    def num_finite_BL(self) -> Integers:
        return np.where(np.isnan(self.min_BL), 0, self.num_steps_B[:, None] - self.num_nonfinite_BL)

    def select(self, which_B: NDArray[np.bool_] | slice) -> Self:
        """Return some of the buckets."""
        return type(self)(*(getattr(self, name)[which_B] for name in self.__slots__))

    def with_width(self, num_columns: int) -> Self:
        """Keep the first columns; those that are missing have no value, and none that is not finite."""
        missing = num_columns - self.mean_BL.shape[1]
        if missing == 0:
            return self
        columns = []
        for name in self.__slots__:
            values = getattr(self, name)
            if values.ndim == 2 and missing < 0:
                values = values[:, :num_columns]
            elif values.ndim == 2:
                fill = np.full((self.num_buckets, missing), 0 if values.dtype.kind == "i" else np.nan)
                values = np.hstack([values, fill.astype(values.dtype)])
            columns.append(values)
        return type(self)(*columns)

    def downsample(self, max_buckets: int) -> Self:
        """Merge neighbours into at most `max_buckets` buckets, each of about as many steps."""
        if self.num_buckets <= max_buckets:
            return self
        before_B = np.cumsum(self.num_steps_B) - self.num_steps_B
        indices_B = before_B * max_buckets // self.num_steps
        return self.merge(np.flatnonzero(np.diff(indices_B, prepend=-1)))

    def merge(self, starts: Integers) -> Self:
        """Merge neighbours: `starts` are the indices at which the new buckets begin, from 0 on."""
        if len(starts) == self.num_buckets:
            return self
        sizes = np.diff(np.append(starts, self.num_buckets))
        counts_BL = self.num_finite_BL.astype(np.float64)
        known_BL = counts_BL > 0
        totals = np.add.reduceat(counts_BL, starts)
        with np.errstate(all="ignore"):  # of nothing, and of numbers near the end of the range
            mean = np.add.reduceat(np.where(known_BL, self.mean_BL * counts_BL, 0.0), starts) / totals
            away_BL = np.hypot(self.std_BL, self.mean_BL - np.repeat(mean, sizes, axis=0))
            shares_BL = counts_BL / np.repeat(totals, sizes, axis=0)
            scale = np.fmax.reduceat(np.where(known_BL, away_BL, 0.0), starts)  # squares of small numbers vanish
            scale = np.where(scale > 0, scale, 1.0)
            squares_BL = shares_BL * (away_BL / np.repeat(scale, sizes, axis=0)) ** 2
            std = scale * np.sqrt(np.add.reduceat(np.where(known_BL, squares_BL, 0.0), starts))
        is_single = sizes == 1
        mean[is_single] = self.mean_BL[starts[is_single]]
        anomalous_B = np.where(self.anomalous_steps_B < 0, np.iinfo(np.int64).max, self.anomalous_steps_B)
        anomalous = np.minimum.reduceat(anomalous_B, starts)
        return type(self)(
            first_steps_B=np.minimum.reduceat(self.first_steps_B, starts),
            last_steps_B=np.maximum.reduceat(self.last_steps_B, starts),
            num_steps_B=np.add.reduceat(self.num_steps_B, starts),
            last_at_ms_B=np.maximum.reduceat(self.last_at_ms_B, starts),
            anomalous_steps_B=np.where(anomalous == np.iinfo(np.int64).max, -1, anomalous),
            min_BL=np.fmin.reduceat(self.min_BL, starts),
            max_BL=np.fmax.reduceat(self.max_BL, starts),
            mean_BL=mean,
            std_BL=np.where(totals > 0, std, np.nan),
            num_nonfinite_BL=np.add.reduceat(self.num_nonfinite_BL, starts),
            num_anomalous_BL=np.add.reduceat(self.num_anomalous_BL, starts),
        )

    def encode(self, *, precise: bool) -> bytes:
        """Encode for the database. Unless `precise`, mean and std are rounded to float32."""
        parts = [bytes([VERSION])]
        for name in self.__slots__:
            values = getattr(self, name).ravel()
            if values.dtype.kind == "i":
                parts.append(pack_integers(values))
            else:
                rounds = not precise and name in ("mean_BL", "std_BL")
                parts.append(pack_floats(_rounded(values) if rounds else values))
        return b"".join(parts)

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Decode what `encode` returned.

        Raises:
            InvalidInput: the body does not have this form.
        """
        if not body or body[0] != VERSION:
            raise InvalidInput(f"a summary of version {body[:1]!r}; this program reads version {VERSION}")
        at, columns, num_buckets = 1, [], 0
        for name in cls.__slots__:
            values, at = unpack(body, at)
            if name.endswith("_BL"):
                values = values.reshape(num_buckets, -1)
            else:
                num_buckets = len(values)
            columns.append(values)
        return cls(*columns)


def _rounded(values: Floats) -> Floats:
    """Round to float32, if all values lie in its range."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = values.astype(np.float32).astype(np.float64)
    return narrow if (np.isfinite(narrow) == np.isfinite(values)).all() else values
