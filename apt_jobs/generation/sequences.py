"""One text that grows: its tokens, its sampling parameters, its state and who hears of it."""

import itertools
import queue
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Literal

from apt_jobs.errors import AptJobsError
from apt_jobs.generation.adapter_bank import Adapter
from apt_jobs.generation.constraints import Constraint

SEED_BITS = 63
FinishReason = Literal["stop", "length"]


class SequenceState(Enum):
    """Where a sequence is on its way."""

    WAITING = "waiting"  # has no slot: it is new, or was preempted
    PREFILL = "prefill"  # has a slot; its tokens are read in chunks
    DECODE = "decode"  # one token a step
    FINISHED = "finished"  # ended, failed or aborted; its slot is another's


class Priority(IntEnum):
    """Who goes first. A batch sequence gives its slot up when an interactive one needs it."""

    INTERACTIVE = 0
    BATCH = 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one sequence are chosen, and what ends it."""

    max_tokens: int = 100
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None  # likeliest tokens beside the chosen one; none: not even that one's
    seed: int = field(default_factory=lambda: secrets.randbits(SEED_BITS))
    sequence: int = 0  # number among the sequences of one prompt, which share a seed
    end_tokens: frozenset[int] = frozenset()

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= 0

    @property
    def has_penalties(self) -> bool:
        """Say whether logits are changed before a token is chosen."""
        return bool(self.logit_bias) or (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        )


@dataclass(frozen=True, slots=True)
class TokenChances:
    """The log-probability of a chosen token, and those of the likeliest ones in its place."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step added to a sequence. The last one has a reason or an error."""

    token_ids: tuple[int, ...] = ()
    chances: tuple[TokenChances, ...] = ()  # of each token, where they were asked for
    finish_reason: FinishReason | None = None
    error: AptJobsError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Aborted(AptJobsError):
    """The sequence was aborted."""


_numbers = itertools.count()


def next_id() -> int:
    """Return a number that no other sequence of this process has."""
    return next(_numbers)


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence of the scheduler, which alone changes it. `on_delta` is called in the engine's thread: be quick."""

    prompt_ids: list[int]
    params: SamplingParams
    max_total_tokens: int  # prompt and output; the context, or less
    on_delta: Callable[[Delta], None]
    priority: Priority = Priority.INTERACTIVE
    constraint: Constraint | None = None  # what its tokens may be
    group: object = None  # sequences of one request share a group: fairness is between groups
    id: int = field(default_factory=next_id)
    output_ids: list[int] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING
    slot: int = -1
    num_cached: int = 0  # tokens whose keys and values are in the slot, launched steps included
    num_reused: int = 0  # of these, tokens that were copied instead of read
    num_launched: int = 0  # output tokens, those of launched steps included
    adapter: Adapter | None = None  # what the model's weights are changed by for it

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that it may still add in all: what was asked for, or what the context has room for."""
        return min(self.params.max_tokens, self.max_total_tokens - len(self.prompt_ids))

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def final_tokens(self) -> int:
        """Tokens of its slot when it is done."""
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def adapter_slot(self) -> int:
        """Return where its adapter is; 0: it has none."""
        return 0 if self.adapter is None else self.adapter.slot

    @property
    def is_constrained(self) -> bool:
        """Say whether the tokens before have to be known before the next is chosen."""
        return self.constraint is not None and self.constraint.is_active

    def token_ids(self) -> list[int]:
        """Return prompt and output."""
        return self.prompt_ids + self.output_ids

    def append(self, token: int, chances: TokenChances | None = None) -> None:
        """Add a sampled token and emit it; end the sequence where it ends."""
        if token in self.params.end_tokens:
            self.finish("stop")
            return
        if self.constraint is not None:
            try:
                self.constraint.accept(token)
            except AptJobsError as exc:
                self.fail(exc)
                return
        self.output_ids.append(token)
        reason: FinishReason | None = None
        if self.constraint is not None and self.constraint.is_complete:
            reason = "stop"
        elif len(self.output_ids) >= self.max_new_tokens:
            reason = "length"
        if reason is not None:
            self.state = SequenceState.FINISHED
        self.on_delta(Delta((token,), () if chances is None else (chances,), reason))

    def finish(self, reason: FinishReason) -> None:
        """End it."""
        if not self.is_finished:
            self.state = SequenceState.FINISHED
            self.on_delta(Delta(finish_reason=reason))

    def fail(self, error: AptJobsError) -> None:
        """End it with an error, unless it has ended."""
        if not self.is_finished:
            self.state = SequenceState.FINISHED
            self.on_delta(Delta(error=error))


class Handle:
    """The outside of a submitted sequence: iterate over its deltas, in any thread."""

    def __init__(self) -> None:
        self.id = next_id()
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()

    def push(self, delta: Delta) -> None:
        """Receive a delta. Called by the engine."""
        self._deltas.put(delta)

    def fail(self, error: AptJobsError) -> None:
        """End it with an error. Called by the engine."""
        self.push(Delta(error=error))

    def __iter__(self) -> Iterator[Delta]:
        """Yield deltas until the last.

        Raises:
            AptJobsError: the sequence failed or was aborted.
        """
        while True:
            delta = self._deltas.get()
            if delta.error is not None:
                raise delta.error
            yield delta
            if delta.is_last:
                return

    def token_ids(self) -> list[int]:
        """Wait for the end and return all tokens."""
        return [token for delta in self for token in delta.token_ids]
