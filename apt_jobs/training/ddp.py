"""The process group: who this rank is, and what all ranks do together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from apt_jobs.jobs.environment import GPU_MEMORY_VARIABLE
from apt_jobs.training.torchrun import read_rank_info

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a rank that waits longer fails, and the job with it


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among the others of the attempt."""

    rank: int
    world_size: int
    device: torch.device
    backend: str

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(device: str) -> Iterator[Rank]:
    """Join the other ranks: NCCL on GPUs ("cuda"), gloo on CPUs."""
    place = read_rank_info()
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
        cap_memory(place.local_rank)
        backend, where = "nccl", torch.device("cuda", place.local_rank)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        backend, where = "gloo", torch.device("cpu")
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=where if device == "cuda" else None)
    try:
        yield Rank(place.rank, place.world_size, where, backend)
    finally:
        dist.destroy_process_group()


def cap_memory(device_index: int) -> None:
    """Keep this process to its part of a GPU that others share: torch raises out of memory beyond it."""
    if fractions := os.environ.get(GPU_MEMORY_VARIABLE):
        torch.cuda.set_per_process_memory_fraction(float(fractions.split(",")[device_index]), device_index)


def repeatable(device: torch.device) -> None:
    """On a GPU refuse operations whose result can differ from run to run, and take the repeatable form of others.

    cuBLAS needs `CUBLAS_WORKSPACE_CONFIG` for it, which whoever starts the ranks has to set.
    """
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        # It costs, and nothing here reads such memory. (torch leaves it untyped.)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def summed(values: Tensor) -> Tensor:
    """`values` summed over the ranks, in place."""
    dist.all_reduce(values)
    return values
