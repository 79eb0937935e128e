"""Tokens on their way from the device to their sequences."""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_jobs.generation.row_state import RowState, Sampling
from apt_jobs.generation.sampler import choose
from apt_jobs.generation.sequences import Sequence, TokenChances

MIN_LOGPROB = -9_999.0  # of a token that is impossible: JSON knows no infinity


@dataclass(slots=True)
class Launched:
    """The tokens of one launch: who gets them, and how to wait for them."""

    sequences: list[Sequence]
    read: Callable[[], list[int]]
    chances: Callable[[int], TokenChances] | None = None  # of the sequence at a place of the list, once `read` returned


class TokenReader:
    """Brings what a step chose to the host without waiting for it: pinned memory and an event."""

    def __init__(self, state: RowState, slots: Rows[int], sampling: Sampling) -> None:
        self._slots = slots  # rows of the state, in the order of the launch's sequences
        self._event: torch.cuda.Event | None = None
        columns = [state.chosen_B]
        if sampling.with_chances:
            assert state.logprob_B is not None
            assert state.likeliest_BK is not None
            assert state.likeliest_logprobs_BK is not None
            columns += [state.logprob_B, state.likeliest_BK, state.likeliest_logprobs_BK]
        self._host = [_copied(column) for column in columns]
        self._chosen: list[int] = []
        if state.chosen_B.device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # the library's
            self._event.record()

    def launched(self, sequences: Rows[Sequence]) -> Launched:
        """Return the launch."""
        return Launched(list(sequences), self._read, self._chances if len(self._host) > 1 else None)

    def _read(self) -> list[int]:
        """Wait for the tokens."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._host[0].tolist()
        self._chosen = [tokens[slot] for slot in self._slots]
        return self._chosen

    def _chances(self, place: int) -> TokenChances:
        _, logprob_B, likeliest_BK, logprobs_BK = self._host
        slot = self._slots[place]
        likeliest = zip(likeliest_BK[slot].tolist(), logprobs_BK[slot].clamp(min=MIN_LOGPROB).tolist(), strict=True)
        return TokenChances(self._chosen[place], max(float(logprob_B[slot]), MIN_LOGPROB), tuple(likeliest))


def sample(sequences: Rows[Sequence], logits_NV: Tensor, state: RowState, *, is_first: bool) -> Launched:
    """Choose the next token of rows that are not the first ones of the state.

    Args:
        sequences: have slots, and their positions are set.
        logits_NV: behind each.
        state: of all slots; receives the tokens.
        is_first: their prompts were just read.
    """
    if is_first:
        state.admit(sequences, logits_NV.shape[1])
    sampling = Sampling.needed_by(sequences)
    if sampling.masked:
        state.set_allowed(sequences)
    rows = state.of(torch.tensor([each.slot for each in sequences], device=logits_NV.device))
    chosen_N = choose(logits_NV, rows.position_B, *rows.sampling_rows(sampling))
    rows.accept(logits_NV, chosen_N, sampling)
    state.write(sequences, chosen_N, sampling)
    for each in sequences:
        each.num_launched += 1
    return TokenReader(rows, range(len(sequences)), sampling).launched(sequences)


def _copied(column: Tensor) -> Tensor:
    if column.device.type != "cuda":
        return column.clone()
    host = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
    return host.copy_(column, non_blocking=True)
