"""What the host learns of a step, one step later: loss, gradient norm, stop flag, pending commands.

A step is queued on the GPU without a wait; while it computes, the host queues the next one, and only then reads what
the first one gave. The same on CPUs, so that all trainings act at the same steps.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_jobs.training.commands import Commands
from apt_jobs.training.ddp import Rank


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of one step; the same on every rank."""

    step: int
    learning_rate: float
    began_s: float  # on the clock of `time.perf_counter`
    done_s: float  # the same clock; on a CPU a step is done when it is queued, however late it is read
    loss_sum: float  # of all ranks
    stop: bool
    num_commands: int
    grad_norm: float


@dataclass(slots=True)
class _InFlight:
    step: int
    learning_rate: float
    began_s: float
    host: Tensor
    event: Any  # torch.cuda.Event; None: the values are there
    queued_s: float = 0.0


class StepResults:
    """Steps whose results are on their way to the host, oldest first. Bounded by whoever calls `receive` each step."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._in_flight: deque[_InFlight] = deque()

    def send(self, step: int, learning_rate: float, began_s: float, values: Tensor) -> None:
        """Start the copy of [loss sum, stop, commands, norm] to pinned memory. No wait."""
        event: Any = None
        if self._is_cuda:
            host = torch.empty(values.shape, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            event.record()
        else:
            host = values
        self._in_flight.append(_InFlight(step, learning_rate, began_s, host, event))

    def note_queued(self) -> None:
        """Note that all of the newest step is queued, its update of the weights included."""
        self._in_flight[-1].queued_s = time.perf_counter()

    def receive(self, *, num_left: int) -> Iterator[StepResult]:
        """Yield the results of all steps but the newest `num_left`.

        Sync point: waits until the GPU has finished those steps. With `num_left=1` it still has the newest to compute.
        """
        while len(self._in_flight) > num_left:
            sent = self._in_flight.popleft()
            if sent.event is not None:
                sent.event.synchronize()
            done_s = time.perf_counter() if self._is_cuda else sent.queued_s
            loss_sum, stop, num_commands, grad_norm = sent.host.tolist()
            yield StepResult(
                sent.step, sent.learning_rate, sent.began_s, done_s, loss_sum, stop > 0, int(num_commands), grad_norm
            )


class Signals:
    """What rank 0 sees in the run's folder (a stop request, commands of policies), as numbers for the all-reduce."""

    def __init__(self, stop_path: Path, commands: Commands, rank: Rank) -> None:
        self._stop_path, self._commands, self._rank = stop_path, commands, rank
        self._seen = (0.0, 0.0)
        self._on_device = torch.zeros(2, device=rank.device)

    def read(self) -> Tensor:
        """Return [stop, pending commands] on the device; zeros on other ranks.

        They are copied only when they change, from pinned memory: no wait.
        """
        if not self._rank.is_first:
            return self._on_device
        seen = (float(self._stop_path.exists()), float(self._commands.num_pending()))
        if seen != self._seen:
            self._seen, host = seen, torch.tensor(seen)
            host = host.pin_memory() if self._rank.device.type == "cuda" else host
            self._on_device = host.to(self._rank.device, non_blocking=True)
        return self._on_device
