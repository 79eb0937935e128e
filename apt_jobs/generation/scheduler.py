"""The scheduler of one model: who waits, who is read, who gets a token, who has to give way. Owned by one thread.

A step: admit what waits, read some prompt, add a token to each row, hand out the tokens of the step before (of this one
on CPU). Interactive sequences go before batch ones: some slots are theirs, and they have a batch sequence preempted,
which is recomputed later from its prompt and what it had seen.
"""

import logging
from collections import deque
from collections.abc import Iterable

import torch

from apt_jobs.errors import AptJobsError, InvalidCheckpoint, Unavailable
from apt_jobs.generation.launches import Launched
from apt_jobs.generation.runner import Runner
from apt_jobs.generation.sequences import Aborted, Priority, Sequence, SequenceState

logger = logging.getLogger(__name__)

RESERVED_FRACTION = 8  # one slot of so many is for interactive sequences
STEPS_UNTIL_LARGER = 8  # good steps after an error until the batch may be twice as large again ...
STEPS_UNTIL_LARGER_MEMORY = 512  # ... and after one for want of memory


class Scheduler:
    """Queues and slots of one model.

    Args:
        runner: runs the model.
        model_name: of error messages.
        prefill_tokens: prompt tokens read in a step in which nothing is decoded.
        prefill_tokens_beside: the same beside decoded rows, which pause for so long.
    """

    def __init__(
        self, runner: Runner, model_name: str, *, prefill_tokens: int = 8_192, prefill_tokens_beside: int = 1_024
    ) -> None:
        self._runner, self._model_name = runner, model_name
        self._prefill_tokens, self._prefill_tokens_beside = prefill_tokens, prefill_tokens_beside
        self._waiting: dict[Priority, dict[object, deque[Sequence]]] = {priority: {} for priority in Priority}
        self._running: list[Sequence] = []  # in the order in which they were admitted
        self._in_flight: list[Launched] = []
        self._max_rows = runner.max_rows  # less than the runner's for a while after an error
        self._num_good_steps, self._steps_until_larger = 0, STEPS_UNTIL_LARGER

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._in_flight or any(self._waiting.values()))

    @property
    def num_waiting(self) -> int:
        return sum(len(group) for groups in self._waiting.values() for group in groups.values())

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others of its group."""
        self._waiting[sequence.priority].setdefault(sequence.group, deque()).append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence before its next token."""
        sequence.fail(Aborted("the generation was stopped"))

    def step(self) -> None:
        """Advance every sequence that has a slot."""
        launched: list[Launched] = []
        try:
            self._drop_finished()
            self._admit()
            self._constrain()
            self._prefill(launched)
            if not self._runner.is_async:
                self._receive(launched)
                launched = []
            elif any(each.is_constrained for each in self._running):  # what comes next depends on what is on its way
                self._receive([*self._in_flight, *launched])
                self._in_flight, launched = [], []
            self._constrain()
            self._drop_finished()
            decoding = [each for each in self._running if _needs_token(each)]
            if decoding:
                launched.append(self._runner.decode(decoding))
            arrived, self._in_flight = self._in_flight, launched
            if not self._runner.is_async:
                arrived, self._in_flight = launched, []
            self._receive(arrived)
        except Exception as exc:  # whatever breaks in a model ends one sequence, never the engine
            self._recover(exc)
        else:
            self._enlarge()
        self._drop_finished()

    def fail_all(self, error: AptJobsError) -> None:
        """End everything."""
        for sequence in (*self._running, *self._all_waiting()):
            sequence.fail(error)
        self._in_flight = []
        self._drop_finished()

    # -- waiting -> prefill -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while (sequence := self._next_waiting()) is not None:
            if not self._has_room_for(sequence):
                victim = self._victim_for(sequence)
                if victim is None:
                    return
                self._preempt(victim)
                continue
            self._pop_waiting(sequence)
            sequence.state = SequenceState.PREFILL
            sequence.num_launched = len(sequence.output_ids)
            self._running.append(sequence)
            self._runner.admit(sequence)

    def _next_waiting(self) -> Sequence | None:
        """Return the first of the group that has least running, interactive groups before batch ones."""
        running: dict[object, int] = {}
        for each in self._running:
            running[each.group] = running.get(each.group, 0) + 1
        for groups in self._waiting.values():
            for group in [group for group, waiting in groups.items() if not waiting]:
                del groups[group]
            if groups:
                return groups[min(groups, key=lambda group: running.get(group, 0))][0]
        return None

    def _pop_waiting(self, sequence: Sequence) -> None:
        groups = self._waiting[sequence.priority]
        groups[sequence.group].popleft()
        if not groups[sequence.group]:
            del groups[sequence.group]

    def _has_room_for(self, sequence: Sequence) -> bool:
        places = self._max_rows
        if sequence.priority is Priority.BATCH:
            places -= min(places // RESERVED_FRACTION, places - 1)
        return len(self._running) < places and self._runner.fits(sequence, self._running)

    def _victim_for(self, sequence: Sequence) -> Sequence | None:
        """Return the sequence that gives its slot to this one.

        It is the youngest of the batch ones for an interactive sequence, and for any the youngest of a group that has
        more than half of all slots while the sequence's group has none.
        """
        interactive = sequence.priority is Priority.INTERACTIVE
        if interactive:
            for each in reversed(self._running):
                if each.priority is Priority.BATCH:
                    return each
        sizes: dict[object, int] = {}
        for each in self._running:
            sizes[each.group] = sizes.get(each.group, 0) + 1
        if sequence.group in sizes:
            return None
        for each in reversed(self._running):
            may = interactive or each.priority is Priority.BATCH
            if may and 2 * sizes[each.group] > max(2, self._max_rows):
                return each
        return None

    def _preempt(self, sequence: Sequence) -> None:
        """Take the slot away; the sequence is read again when it has its next one."""
        self._receive(self._in_flight)
        self._in_flight = []
        self._runner.release(sequence)
        self._running.remove(sequence)
        self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        if not sequence.is_finished:
            sequence.state, sequence.num_cached = SequenceState.WAITING, 0
            self._waiting[sequence.priority].setdefault(sequence.group, deque()).appendleft(sequence)

    # -- prefill -> decode -> finished --------------------------------------------------------------------------------

    def _prefill(self, launched: list[Launched]) -> None:
        """Read chunks, interactive sequences first, until the step's share of tokens is read."""
        decoding = any(_needs_token(each) for each in self._running)
        left = self._prefill_tokens_beside if decoding else self._prefill_tokens
        while left > 0:
            reading = [each for each in self._running if each.state is SequenceState.PREFILL and not each.is_finished]
            if not reading:
                return
            reading.sort(key=lambda each: each.priority)
            before = {each.id: each.num_cached - each.num_reused for each in reading}
            launched += self._runner.prefill(reading, left)
            for each in reading:
                left -= each.num_cached - each.num_reused - before[each.id]
                if each.num_cached >= each.num_tokens:
                    each.state = SequenceState.DECODE

    def _constrain(self) -> None:
        """Compute what the next tokens may be; a grammar that breaks ends its own sequence."""
        for each in self._running:
            if each.constraint is not None and each.is_constrained and not each.is_finished:
                try:
                    each.constraint.allowed()
                except AptJobsError as exc:
                    each.fail(exc)

    def _receive(self, arrived: Iterable[Launched]) -> None:
        """Hand the tokens of earlier launches to their sequences."""
        for launched in arrived:
            for place, (sequence, token) in enumerate(zip(launched.sequences, launched.read(), strict=True)):
                if sequence.is_finished:
                    continue
                if token < 0:
                    sequence.fail(self._not_finite())
                    self._runner.release(sequence, wipe=True)
                elif sequence.params.num_logprobs is None or launched.chances is None:
                    sequence.append(token)
                else:
                    sequence.append(token, launched.chances(place))

    def _drop_finished(self) -> None:
        if any(each.is_finished for each in self._running):
            for each in self._running:
                if each.is_finished:
                    self._runner.release(each)
            self._running = [each for each in self._running if not each.is_finished]
        for groups in self._waiting.values():
            for group, waiting in list(groups.items()):
                if any(each.is_finished for each in waiting):
                    groups[group] = deque(each for each in waiting if not each.is_finished)

    # -- errors -------------------------------------------------------------------------------------------------------

    def _recover(self, exc: Exception) -> None:
        """Halve the batch and recompute everybody; a sequence that breaks alone is the one that fails."""
        no_memory = isinstance(exc, torch.OutOfMemoryError)
        logger.warning(
            "a step broke", extra={"model": self._model_name, "num_rows": len(self._running)}, exc_info=not no_memory
        )
        running, self._running, self._in_flight = self._running, [], []
        alive = [each for each in running if not each.is_finished]
        if len(alive) == 1:
            alive[0].fail(self._no_memory(exc) if no_memory else self._broken(exc))
        for each in reversed(alive):
            self._requeue(each)
        self._runner.reset()
        self._max_rows = max(1, min(self._max_rows, len(alive)) // 2)
        self._num_good_steps = 0
        self._steps_until_larger = STEPS_UNTIL_LARGER_MEMORY if no_memory else STEPS_UNTIL_LARGER

    def _enlarge(self) -> None:
        self._num_good_steps += 1
        if self._max_rows < self._runner.max_rows and self._num_good_steps % self._steps_until_larger == 0:
            self._max_rows = min(2 * self._max_rows, self._runner.max_rows)

    def _not_finite(self) -> AptJobsError:
        return InvalidCheckpoint(
            f"model {self._model_name!r} gives NaN or infinity: its training diverged; choose another"
        )

    def _no_memory(self, exc: Exception) -> AptJobsError:
        return Unavailable(f"no memory for a single text of model {self._model_name!r}: {exc}")

    def _broken(self, exc: Exception) -> AptJobsError:
        return InvalidCheckpoint(f"model {self._model_name!r} broke: {exc!r}")

    def _all_waiting(self) -> list[Sequence]:
        return [each for groups in self._waiting.values() for waiting in groups.values() for each in waiting]


def _needs_token(sequence: Sequence) -> bool:
    """Say whether a step should add a token: all that are known to be needed may be on their way already."""
    return sequence.state is SequenceState.DECODE and sequence.num_launched < sequence.max_new_tokens
