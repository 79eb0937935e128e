"""A mixture of data sets: rows of each in the share that its weight asks for, in an order that can be repeated.

An epoch has as many rows as all data sets together, so many of each as its share says. Each data set is read in passes,
every pass in another order: no row of it comes twice before all have come, however small or heavy it is. Which row
comes when is a function of the seed and the epoch alone. Shapes: R rows of a batch, T tokens of a row.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from apt_jobs.errors import InvalidInput
from apt_jobs.training.sequences import IGNORED_LABEL, Indices, Rows, Sequences


class MixedSequences:
    """The rows of several data sets, one after the other: row `begins[i] + n` is row n of data set i."""

    def __init__(self, parts: Sequence[Sequences], shares: Sequence[float], names: Sequence[str]) -> None:
        """Mix `parts`, none of which is empty, by their shares, which add up to 1.

        Raises:
            InvalidInput: the share of a data set is less than a row of an epoch.
        """
        self._parts = list(parts)
        sizes = [len(part) for part in parts]
        self._begins = np.cumsum([0, *sizes])
        self._sizes, self._quotas = tuple(sizes), _quotas(sum(sizes), shares)
        for name, quota, share in zip(names, self._quotas, shares, strict=True):
            if quota == 0:
                raise InvalidInput(
                    f"datasets: the weight of {name!r} gives it {share:.2g} of {sum(sizes):,} sequences an epoch, less "
                    "than one; raise its weight or leave it out"
                )

    @property
    def quotas(self) -> tuple[int, ...]:
        """Rows of each data set in an epoch."""
        return self._quotas

    @property
    def is_packed(self) -> bool:
        return any(part.is_packed for part in self._parts)

    @property
    def is_plain(self) -> bool:
        return all(part.is_plain for part in self._parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, without padding: the mean row of each data set as often as it comes."""
        means = [part.num_tokens / len(part) for part in self._parts]
        return round(sum(quota * mean for quota, mean in zip(self._quotas, means, strict=True)))

    def __len__(self) -> int:
        return int(self._begins[-1])

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the rows of an epoch (from 0), in the order in which they are trained on."""
        return _mixed_order(seed, epoch, self._sizes, self._quotas)

    def gather(self, rows: Indices) -> Rows:
        found = [(places, self._parts[number].gather(local)) for number, places, local in self._split(rows)]
        per_row = len(found[0][1].ids_RT) // len(found[0][0])  # of pairs two: all chosen ones, then all rejected
        num_tokens = max(part.ids_RT.shape[1] for _, part in found)
        shape = (per_row, len(rows), num_tokens)
        ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED_LABEL)
        positions = torch.arange(num_tokens).repeat(per_row, len(rows), 1)
        for places, part in found:
            place = torch.from_numpy(places)
            length = part.ids_RT.shape[1]
            ids[:, place, :length] = part.ids_RT.view(per_row, len(places), length)
            labels[:, place, :length] = part.labels_RT.view(per_row, len(places), length)
            if part.positions_RT is not None:
                positions[:, place, :length] = part.positions_RT.view(per_row, len(places), length)
        flat = (per_row * len(rows), num_tokens)
        ids_RT = ids.view(flat)
        labels_RT = ids_RT if self.is_plain else labels.view(flat)
        return Rows(ids_RT, labels_RT, positions.view(flat) if self.is_packed else None)

    def num_targets(self, rows: Indices) -> int:
        return sum(self._parts[number].num_targets(local) for number, _, local in self._split(rows))

    def _split(self, rows: Indices) -> list[tuple[int, Indices, Indices]]:
        """Return for each data set that has some of the rows: its number, their places among `rows`, its own rows."""
        numbers = np.searchsorted(self._begins, rows, side="right") - 1
        return [
            (int(number), places, rows[places] - self._begins[number])
            for number in np.unique(numbers)
            for places in [np.flatnonzero(numbers == number)]
        ]


def _quotas(total: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return whole numbers that add up to `total`, by the shares: the largest remainders are rounded up."""
    exact = np.array(shares) * total
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")[: total - int(quotas.sum())]
    quotas[largest] += 1
    return tuple(int(quota) for quota in quotas)


@functools.lru_cache(maxsize=1)
def _mixed_order(seed: int, epoch: int, sizes: tuple[int, ...], quotas: tuple[int, ...]) -> Tensor:
    """Return the rows of one epoch. Kept until the next: 8 bytes a row of the epoch, and of the largest data set."""
    chosen, begin = [], 0
    for number, (size, quota) in enumerate(zip(sizes, quotas, strict=True)):
        first, end = epoch * quota, (epoch + 1) * quota  # of all rows that this data set ever gives
        for one_pass in range(first // size, -(-end // size)):
            order = torch.randperm(size, generator=_generator(seed, number + 1, one_pass))
            part = order[max(first - one_pass * size, 0) : end - one_pass * size]
            chosen.append(part + begin)
        begin += size
    rows = torch.cat(chosen)
    return rows[torch.randperm(len(rows), generator=_generator(seed, 0, epoch))]


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """Return a generator of its own for each stream and number."""
    state = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
