"""What a step needs of its rows, on the device: last token, position, sampling parameters, what was seen.

The host writes a row when its prompt was read; after that the device carries it from step to step by itself.
Shapes: S slots, B the first of them, N some of them, V vocabulary, W words of 32 bits that hold it, K likeliest tokens.
"""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from apt_jobs.generation.constraints import num_words
from apt_jobs.generation.sampler import PenaltyRows, SamplingRows, log_probabilities, row_seed
from apt_jobs.generation.sequences import Sequence

MAX_LIKELIEST = 20  # tokens whose log-probabilities are kept beside the chosen one's
_TEMPERATURE, _TOP_P, _MIN_P, _REPETITION, _PRESENCE, _FREQUENCY, _NUM_FLOATS = range(7)
_TOP_K, _SEED, _NUM_INTS = range(3)


class Sampling(NamedTuple):
    """What a step has to do after the forward; each combination is a graph of its own."""

    sampled: bool = False  # else greedy
    penalized: bool = False
    masked: bool = False
    with_chances: bool = False
    adapters: int = 0  # version of the bank that some rows' adapters are in; 0: no row has one

    @classmethod
    def needed_by(cls, sequences: Rows[Sequence]) -> "Sampling":
        """Return the least that serves all."""
        params = [each.params for each in sequences]
        return cls(
            sampled=not all(each.is_greedy for each in params),
            penalized=any(each.has_penalties for each in params),
            masked=any(each.is_constrained for each in sequences),
            with_chances=any(each.num_logprobs is not None for each in params),
            adapters=max((each.adapter.bank.version for each in sequences if each.adapter is not None), default=0),
        )


@dataclass(slots=True)
class RowState:
    """Columns of rows. `first` gives views (a graph's inputs), `of` copies."""

    token_B: Tensor
    position_B: Tensor
    active_B: Tensor
    chosen_B: Tensor
    adapter_B: Tensor  # slots of adapters
    floats_BF: Tensor
    ints_BI: Tensor

    # none until a sequence needs them; then they stay where they are, as graphs know their place
    in_prompt_BV: Tensor | None = None
    num_in_output_BV: Tensor | None = None
    bias_BV: Tensor | None = None
    allowed_BW: Tensor | None = None
    logprob_B: Tensor | None = None
    likeliest_BK: Tensor | None = None
    likeliest_logprobs_BK: Tensor | None = None

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

    def sampling_rows(self, sampling: Sampling) -> tuple[SamplingRows | None, PenaltyRows | None, Tensor | None]:
        """Return what `choose` takes."""
        rows = penalties = allowed_BW = None
        if sampling.sampled:
            rows = SamplingRows(
                temperature_B=self.floats_BF[:, _TEMPERATURE],
                top_k_B=self.ints_BI[:, _TOP_K],
                top_p_B=self.floats_BF[:, _TOP_P],
                min_p_B=self.floats_BF[:, _MIN_P],
                seed_B=self.ints_BI[:, _SEED],
            )
        if sampling.penalized:
            assert self.in_prompt_BV is not None
            assert self.num_in_output_BV is not None
            assert self.bias_BV is not None
            penalties = PenaltyRows(
                repetition_B=self.floats_BF[:, _REPETITION],
                presence_B=self.floats_BF[:, _PRESENCE],
                frequency_B=self.floats_BF[:, _FREQUENCY],
                in_prompt_BV=self.in_prompt_BV,
                num_in_output_BV=self.num_in_output_BV,
                bias_BV=self.bias_BV,
            )
        if sampling.masked:
            assert self.allowed_BW is not None
            allowed_BW = self.allowed_BW
        return rows, penalties, allowed_BW

    def accept(self, logits_BV: Tensor, chosen_B: Tensor, sampling: Sampling) -> None:
        """Move active rows on by the token that was chosen."""
        self.chosen_B.copy_(chosen_B)
        moved_B = self.active_B & (chosen_B >= 0)
        self.token_B.copy_(torch.where(moved_B, chosen_B, self.token_B))
        self.position_B.add_(self.active_B)
        if sampling.penalized:
            assert self.num_in_output_BV is not None
            self.num_in_output_BV.scatter_add_(1, chosen_B.clamp(min=0)[:, None], moved_B[:, None].int())
        if sampling.with_chances:
            assert self.logprob_B is not None
            assert self.likeliest_BK is not None
            assert self.likeliest_logprobs_BK is not None
            logprob_B, likeliest_BK, logprobs_BK = log_probabilities(logits_BV, chosen_B, MAX_LIKELIEST)
            self.logprob_B.copy_(logprob_B)
            self.likeliest_BK.copy_(likeliest_BK)
            self.likeliest_logprobs_BK.copy_(logprobs_BK)

    def set_active(self, active: Rows[bool]) -> None:
        """Say which of the first rows move on."""
        self.active_B[: len(active)] = _sent(active, self.active_B)

    def set_allowed(self, sequences: Rows[Sequence]) -> None:
        """Say what the next tokens of constrained sequences may be, and that the others' are free."""
        assert self.allowed_BW is not None
        allowed_BW = torch.full(self.allowed_BW.shape, -1, dtype=torch.int32)
        for each in sequences:
            if each.is_constrained:
                assert each.constraint is not None
                allowed_BW[each.slot] = each.constraint.allowed()
        self.allowed_BW.copy_(_on(self.allowed_BW.device, allowed_BW))

    def admit(self, sequences: Rows[Sequence], vocabulary_size: int) -> None:
        """Write the parameters of rows whose prompt was read."""
        slots_N = _sent([each.slot for each in sequences], self.position_B)
        self.adapter_B[slots_N] = _sent([each.adapter_slot for each in sequences], self.adapter_B)
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
        self._have_room_for(sequences, vocabulary_size)
        if self.bias_BV is not None:
            self.bias_BV[slots_N] = 0.0
        for each in sequences:
            if each.params.has_penalties:
                self._count(each)

    def set_positions(self, sequences: Rows[Sequence]) -> None:
        """Say where the next token of each goes."""
        slots_N = _sent([each.slot for each in sequences], self.position_B)
        self.position_B[slots_N] = _sent([each.num_cached for each in sequences], self.position_B)

    def write(self, sequences: Rows[Sequence], chosen_N: Tensor, sampling: Sampling) -> None:
        """Set the first token of rows whose prompt was read."""
        slots_N = _sent([each.slot for each in sequences], self.position_B)
        self.token_B[slots_N] = chosen_N.clamp(min=0)
        if sampling.penalized:
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
        self.adapter_B[slot] = 0

    def _have_room_for(self, sequences: Rows[Sequence], vocabulary_size: int) -> None:
        """Make the columns that these sequences need, and nobody before them."""
        shape, device = (len(self.token_B), vocabulary_size), self.token_B.device
        if self.bias_BV is None and any(each.params.has_penalties for each in sequences):
            self.in_prompt_BV = torch.zeros(shape, dtype=torch.bool, device=device)
            self.num_in_output_BV = torch.zeros(shape, dtype=torch.int32, device=device)
            self.bias_BV = torch.zeros(shape, device=device)
        if self.allowed_BW is None and any(each.constraint is not None for each in sequences):
            words = (shape[0], num_words(vocabulary_size))
            self.allowed_BW = torch.full(words, -1, dtype=torch.int32, device=device)
        if self.logprob_B is None and any(each.params.num_logprobs is not None for each in sequences):
            likeliest = (shape[0], min(MAX_LIKELIEST, vocabulary_size))
            self.logprob_B = torch.zeros(shape[0], device=device)
            self.likeliest_BK = torch.zeros(likeliest, dtype=torch.long, device=device)
            self.likeliest_logprobs_BK = torch.zeros(likeliest, device=device)

    def _count(self, sequence: Sequence) -> None:
        """Count what a sequence has seen, and write its biases."""
        assert self.in_prompt_BV is not None
        assert self.num_in_output_BV is not None
        assert self.bias_BV is not None
        slot, bias = sequence.slot, sequence.params.logit_bias
        self.in_prompt_BV[slot] = False
        self.in_prompt_BV[slot, _sent(sequence.prompt_ids, self.token_B)] = True
        vocabulary_size = self.num_in_output_BV.shape[1]
        counted = torch.bincount(torch.tensor(sequence.output_ids, dtype=torch.long), minlength=vocabulary_size)
        self.num_in_output_BV[slot] = counted.int().to(self.token_B.device)
        if bias:
            self.bias_BV[slot, _sent(list(bias), self.token_B)] = _sent(list(bias.values()), self.bias_BV)

    def _columns(self) -> list[Tensor | None]:
        return [getattr(self, one.name) for one in fields(self)]

    def _each(self, of: Callable[[Tensor], Tensor]) -> "RowState":
        changed = [None if column is None else of(column) for column in self._columns()]
        return RowState(*changed)  # type: ignore[arg-type]  # none is in the optional ones only


def _sent(values: Rows[object], like: Tensor) -> Tensor:
    """Copy numbers to a column's device, without waiting for it."""
    return _on(like.device, torch.tensor(values, dtype=like.dtype))


def _on(device: torch.device, host: Tensor) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
