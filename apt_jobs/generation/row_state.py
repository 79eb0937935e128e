"""What a step needs of its rows, on the device: last token, position, sampling parameters, what was seen.

The host writes a row when its prompt was read; after that the device carries it from step to step by itself.
Shapes: S slots, B the first of them, N some of them, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from enum import Enum

import torch
from torch import Tensor

from apt_jobs.generation.sampler import PenaltyRows, SamplingRows, row_seed
from apt_jobs.generation.sequences import SamplingParams, Sequence

_TEMPERATURE, _TOP_P, _MIN_P, _REPETITION, _PRESENCE, _FREQUENCY, _NUM_FLOATS = range(7)
_TOP_K, _SEED, _NUM_INTS = range(3)


class Sampling(Enum):
    """How much a step has to do after the forward; each is a graph of its own."""

    GREEDY = "greedy"
    SAMPLED = "sampled"
    PENALIZED = "penalized"

    @classmethod
    def needed_by(cls, params: Rows[SamplingParams]) -> "Sampling":
        """Return the least that serves all rows."""
        if any(each.has_penalties for each in params):
            return cls.PENALIZED
        return cls.GREEDY if all(each.is_greedy for each in params) else cls.SAMPLED


class RowState:
    """Columns of rows. `first` gives views (a graph's inputs), `of` copies."""

    def __init__(
        self,
        token_B: Tensor,
        position_B: Tensor,
        active_B: Tensor,
        chosen_B: Tensor,
        floats_BF: Tensor,
        ints_BI: Tensor,
        in_prompt_BV: Tensor | None = None,
        num_in_output_BV: Tensor | None = None,
    ) -> None:
        self.token_B, self.position_B, self.active_B, self.chosen_B = token_B, position_B, active_B, chosen_B
        self.floats_BF, self.ints_BI = floats_BF, ints_BI
        self.in_prompt_BV, self.num_in_output_BV = in_prompt_BV, num_in_output_BV

    @classmethod
    def zeros(cls, num_slots: int, device: torch.device) -> "RowState":
        """Return the state of empty slots."""

        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, dtype=dtype, device=device)

        return cls(
            column(torch.long),
            column(torch.long),
            column(torch.bool),
            column(torch.long),
            torch.zeros((num_slots, _NUM_FLOATS), device=device),
            torch.zeros((num_slots, _NUM_INTS), dtype=torch.long, device=device),
        )

    def first(self, num_rows: int) -> "RowState":
        """Return views of the first rows."""
        return self._each(lambda column: column[:num_rows])

    def of(self, slots_N: Tensor) -> "RowState":
        """Return copies of rows."""
        return self._each(lambda column: column[slots_N])

    def clone(self) -> "RowState":
        """Return copies of all rows."""
        return self._each(torch.clone)

    def sampling_rows(self, sampling: Sampling) -> tuple[SamplingRows | None, PenaltyRows | None]:
        """Return what `choose` takes."""
        if sampling is Sampling.GREEDY:
            return None, None
        floats_BF, ints_BI = self.floats_BF, self.ints_BI
        rows = SamplingRows(
            temperature_B=floats_BF[:, _TEMPERATURE],
            top_k_B=ints_BI[:, _TOP_K],
            top_p_B=floats_BF[:, _TOP_P],
            min_p_B=floats_BF[:, _MIN_P],
            seed_B=ints_BI[:, _SEED],
        )
        if sampling is Sampling.SAMPLED:
            return rows, None
        assert self.in_prompt_BV is not None
        assert self.num_in_output_BV is not None
        penalties = PenaltyRows(
            repetition_B=floats_BF[:, _REPETITION],
            presence_B=floats_BF[:, _PRESENCE],
            frequency_B=floats_BF[:, _FREQUENCY],
            in_prompt_BV=self.in_prompt_BV,
            num_in_output_BV=self.num_in_output_BV,
        )
        return rows, penalties

    def accept(self, chosen_B: Tensor, sampling: Sampling) -> None:
        """Move active rows on by the token that was chosen."""
        self.chosen_B.copy_(chosen_B)
        moved_B = self.active_B & (chosen_B >= 0)
        self.token_B.copy_(torch.where(moved_B, chosen_B, self.token_B))
        self.position_B.add_(self.active_B)
        if sampling is Sampling.PENALIZED:
            assert self.num_in_output_BV is not None
            self.num_in_output_BV.scatter_add_(1, chosen_B.clamp(min=0)[:, None], moved_B[:, None].int())

    def set_active(self, active: Rows[bool]) -> None:
        """Say which of the first rows move on."""
        self.active_B[: len(active)] = _sent(active, self.active_B)

    def admit(self, sequences: Rows[Sequence], vocabulary_size: int) -> None:
        """Write the parameters of rows whose prompt was read."""
        slots_N = _sent([each.slot for each in sequences], self.position_B)
        params = [each.params for each in sequences]
        self.floats_BF[slots_N] = _sent(
            [
                (
                    each.temperature,
                    each.top_p,
                    each.min_p,
                    each.repetition_penalty,
                    each.presence_penalty,
                    each.frequency_penalty,
                )
                for each in params
            ],
            self.floats_BF,
        )
        self.ints_BI[slots_N] = _sent([(each.top_k, row_seed(each.seed, each.sequence)) for each in params], slots_N)
        for each in sequences:
            if each.params.has_penalties:
                self._count(each, vocabulary_size)

    def set_positions(self, sequences: Rows[Sequence]) -> None:
        """Say where the next token of each goes."""
        slots_N = _sent([each.slot for each in sequences], self.position_B)
        self.position_B[slots_N] = _sent([each.num_cached for each in sequences], self.position_B)

    def write(self, sequences: Rows[Sequence], chosen_N: Tensor, sampling: Sampling) -> None:
        """Set the first token of rows whose prompt was read."""
        slots_N = _sent([each.slot for each in sequences], self.position_B)
        self.token_B[slots_N] = chosen_N.clamp(min=0)
        if sampling is Sampling.PENALIZED:
            assert self.num_in_output_BV is not None
            self.num_in_output_BV[slots_N, chosen_N.clamp(min=0)] += 1

    def move(self, source: int, target: int) -> None:
        """Copy a row."""
        for column in self._columns():
            if column is not None:
                column[target] = column[source]

    def clear(self, slot: int) -> None:
        """Make a slot harmless: what an empty row writes goes where its next owner's first token will."""
        self.position_B[slot] = 0

    def _count(self, sequence: Sequence, vocabulary_size: int) -> None:
        if self.in_prompt_BV is None or self.num_in_output_BV is None:
            shape, device = (len(self.token_B), vocabulary_size), self.token_B.device
            self.in_prompt_BV = torch.zeros(shape, dtype=torch.bool, device=device)
            self.num_in_output_BV = torch.zeros(shape, dtype=torch.int32, device=device)
        slot = sequence.slot
        self.in_prompt_BV[slot] = False
        self.in_prompt_BV[slot, _sent(sequence.prompt_ids, self.token_B)] = True
        counted = torch.bincount(torch.tensor(sequence.output_ids, dtype=torch.long), minlength=vocabulary_size)
        self.num_in_output_BV[slot] = counted.int().to(self.token_B.device)

    def _columns(self) -> list[Tensor | None]:
        return [
            self.token_B,
            self.position_B,
            self.active_B,
            self.chosen_B,
            self.floats_BF,
            self.ints_BI,
            self.in_prompt_BV,
            self.num_in_output_BV,
        ]

    def _each(self, of: Callable[[Tensor], Tensor]) -> "RowState":
        return RowState(*[None if column is None else of(column) for column in self._columns()])  # type: ignore[arg-type]  # None is in the last two only


class TokenReader:
    """Brings sampled tokens to the host without waiting for them: pinned memory and an event."""

    def __init__(self, chosen_N: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if chosen_N.device.type == "cuda":
            self._host = torch.empty(chosen_N.shape, dtype=chosen_N.dtype, pin_memory=True)
            self._host.copy_(chosen_N, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # the library's
            self._event.record()
        else:
            self._host = chosen_N.clone()

    def read(self) -> list[int]:
        """Wait for the tokens."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


def _sent(values: Rows[object], like: Tensor) -> Tensor:
    """Copy numbers to a column's device, without waiting for it."""
    host = torch.tensor(values, dtype=like.dtype)
    if like.device.type == "cuda":
        return host.pin_memory().to(like.device, non_blocking=True)
    return host
