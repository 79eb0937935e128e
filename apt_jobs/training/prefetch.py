"""Batches ahead of time: gathered in a thread, in pinned memory, so that their copy to the GPU needs no wait."""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from apt_jobs.training.data import Batch, Batches
from apt_jobs.training.ddp import Rank

NUM_STEPS_AHEAD = 2


class Prefetcher:
    """The micro batches of one rank. What a step gets depends on its number alone, so any step may be asked for."""

    def __init__(self, batches: Batches, rank: Rank) -> None:
        self._batches, self._rank = batches, rank
        self._is_cuda = rank.device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=self._use_device)
        self._ahead: OrderedDict[int, Future[list[Batch]]] = OrderedDict()

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the micro batches of one optimizer step on the rank's device, and prepare the next steps'.

        On a GPU the copies are queued, not waited for: the allocator of pinned memory keeps it until they are done.
        """
        wanted = range(step, step + 1 + NUM_STEPS_AHEAD)
        for number in [number for number in self._ahead if number not in wanted]:  # batches were skipped
            self._ahead.pop(number).cancel()
        for number in wanted:
            if number not in self._ahead:
                self._ahead[number] = self._thread.submit(self._gather, number)
        host = self._ahead.pop(step).result()
        return [batch.to(self._rank.device) for batch in host]

    def close(self) -> None:
        """Drop what nobody asks for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _gather(self, step: int) -> list[Batch]:
        batches = self._batches.micro_batches(step, self._rank.rank)
        return [batch.pinned() for batch in batches] if self._is_cuda else batches

    def _use_device(self) -> None:
        if self._is_cuda:
            torch.cuda.set_device(self._rank.device)
