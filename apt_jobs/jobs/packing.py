"""Which jobs fit on a worker beside each other. Pure: the worker decides by it, and `waiting_for` explains by it."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Self

from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.resources import MIN_GPU_SHARE


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a machine."""

    index: int
    name: str = ""
    memory_gb: float = 0.0  # 10**9 bytes

    def suits(self, needs: Needs) -> bool:
        """Return whether it is of the type, and the job's part has the memory, that a job asks for."""
        if needs.gpu_memory_gb is not None and self.memory_gb * _gpu_share(needs) < needs.gpu_memory_gb:
            return False
        return needs.gpu_type is None or _words(needs.gpu_type) <= _words(self.name)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker has for all its jobs together."""

    gpus: tuple[Gpu, ...] = ()
    cpus: int = 1  # cores
    memory_gb: float = 0.0
    max_jobs: int = 1
    max_cpu_ranks: int = 4  # of one job
    num_nodes: int = 1


@dataclass(frozen=True, slots=True)
class Held:
    """What one running job has to itself."""

    gpus: tuple[int, ...] = ()  # indexes
    cpus: int = 0
    memory_gb: float = 0.0
    num_nodes: int = 1
    ends_by_s: float | None = None  # by its time limit, on the worker's monotonic clock; None: nobody knows
    threads_per_rank: int = 1
    gpu_share: float = 1.0  # of each of its GPUs
    waiting_for: str | None = None  # why it has not started, where another scheduler places it


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker offers and what of it is taken."""

    offer: Offer
    held: Collection[Held] = field(default_factory=tuple)

    @property
    def free_gpus(self) -> tuple[Gpu, ...]:
        """GPUs that no job uses."""
        return self._gpus_with(1.0)

    def free_share(self, gpu: Gpu) -> float:
        """Return the part of a GPU that no job has: 1 of a free one."""
        return round(1.0 - sum(held.gpu_share for held in self.held if gpu.index in held.gpus), 2)

    def _gpus_with(self, share: float) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.offer.gpus if self.free_share(gpu) >= share)

    @property
    def free_cpus(self) -> int:
        return self.offer.cpus - sum(held.cpus for held in self.held)

    @property
    def free_memory_gb(self) -> float:
        return self.offer.memory_gb - sum(held.memory_gb for held in self.held)

    @property
    def is_full(self) -> bool:
        """Whether no job at all can start."""
        return len(self.held) >= self.offer.max_jobs or (self.free_cpus < 1 and not self._gpus_with(MIN_GPU_SHARE))

    def lacks(self, needs: Needs) -> str | None:
        """Return what this worker lacks for such a job even when nothing else runs; None: nothing."""
        offer = self.offer
        if needs.num_nodes > offer.num_nodes:
            return f"the job wants {needs.num_nodes} nodes, and this worker has {offer.num_nodes}"
        if _uses_gpus(needs, offer):
            suitable = sum(gpu.suits(needs) for gpu in offer.gpus)
            if suitable < _num_gpus(needs):
                return f"the job wants {_gpus_in_words(needs)}, and this worker has {suitable} such GPUs"
        elif needs.num_ranks > offer.max_cpu_ranks:
            return f"the job wants {needs.num_ranks} ranks on CPU, where this worker allows {offer.max_cpu_ranks}"
        if _num_cpus(needs, offer) > offer.cpus:
            return f"the job wants {needs.cpus} CPU cores, and this worker has {offer.cpus}"
        if (needs.memory_gb or 0.0) > offer.memory_gb:
            return f"the job wants {needs.memory_gb:g} GB of memory, and this worker has {offer.memory_gb:g}"
        return None

    def place(self, needs: Needs, now_s: float = 0.0) -> Held | None:
        """Return what such a job would have to itself if it started now; None: it does not fit beside the others."""
        offer, num_cpus = self.offer, _num_cpus(needs, self.offer)
        if self.lacks(needs) is not None or self._why_not(needs) is not None:
            return None
        gpus: tuple[int, ...] = ()
        cores = needs.cpus or (num_cpus if self.held else offer.cpus)  # a job that is alone computes on all
        share = _gpu_share(needs)
        if _uses_gpus(needs, offer):  # the fullest and smallest that suit, so that others stay for who needs them
            suitable = sorted(
                (self.free_share(gpu), gpu.memory_gb, gpu.name, gpu.index)
                for gpu in self._gpus_with(share)
                if gpu.suits(needs)
            )
            gpus = tuple(sorted(index for _, _, _, index in suitable[: _num_gpus(needs)]))
            cores = needs.cpus or int(offer.cpus * len(gpus) * share) // len(offer.gpus)
        return Held(
            gpus=gpus,
            gpu_share=share if gpus else 1.0,
            cpus=num_cpus,
            memory_gb=needs.memory_gb or 0.0,
            num_nodes=needs.num_nodes,
            ends_by_s=None if needs.time_limit_s is None else now_s + needs.time_limit_s,
            threads_per_rank=max(1, cores // needs.num_ranks),
        )

    def place_opens_by_s(self, needs: Needs) -> float | None:
        """Return when, by their time limits, enough of the running jobs have ended for such a job; None: unknown."""
        left = sorted(self.held, key=lambda held: (held.ends_by_s is None, held.ends_by_s or 0.0))
        while left and (ends_by_s := left.pop(0).ends_by_s) is not None:
            if Room(self.offer, tuple(left)).place(needs) is not None:
                return ends_by_s
        return None

    def why_not_now(self, needs: Needs) -> str | None:
        """Return in words what is taken that such a job waits for; None: it fits, or never will."""
        return None if self.lacks(needs) is not None else self._why_not(needs)

    def _why_not(self, needs: Needs) -> str | None:
        offer = self.offer
        if len(self.held) >= offer.max_jobs:
            return f"it runs {len(self.held)} of at most {offer.max_jobs} jobs at once"
        if needs.num_nodes > 1 and any(held.num_nodes > 1 for held in self.held):
            return "its further nodes run another job"
        if _uses_gpus(needs, offer):
            free, share = sum(gpu.suits(needs) for gpu in self._gpus_with(_gpu_share(needs))), _gpu_share(needs)
            if free < _num_gpus(needs) and share < 1:
                return f"no GPU that suits has {share:g} of it free"
            if free < _num_gpus(needs):
                return f"{free} of {len(offer.gpus)} GPUs are free and suit, the job takes {_num_gpus(needs)}"
        if (num_cpus := _num_cpus(needs, offer)) > self.free_cpus:
            return f"{self.free_cpus} of {offer.cpus} CPU cores are free, the job takes {num_cpus}"
        if (needs.memory_gb or 0.0) > self.free_memory_gb:
            free_gb, total_gb = f"{self.free_memory_gb:g}", f"{offer.memory_gb:g}"
            return f"{free_gb} of {total_gb} GB of memory are free, the job takes {needs.memory_gb:g}"
        return None


@dataclass(frozen=True, slots=True)
class RoomReport:
    """What a worker's row says of its room; GPUs are described beside it."""

    cpus: int
    memory_gb: float
    max_jobs: int
    max_cpu_ranks: int
    num_nodes: int
    jobs: tuple[tuple[str, Held], ...]  # by id, the one that began first is first
    kept_for: str | None = None  # job that waited long and that room is kept for

    def as_document(self) -> dict[str, Any]:
        """Return it as JSON."""
        jobs = [
            {"id": job_id, "gpus": list(held.gpus), "cpus": held.cpus, "memory_gb": held.memory_gb}
            | ({"num_nodes": held.num_nodes} if held.num_nodes > 1 else {})
            | ({"gpu_share": held.gpu_share} if held.gpu_share < 1 else {})
            | ({"waiting_for": held.waiting_for} if held.waiting_for is not None else {})
            for job_id, held in self.jobs
        ]
        names = ("cpus", "memory_gb", "max_jobs", "max_cpu_ranks", "num_nodes", "kept_for")
        return {name: getattr(self, name) for name in names} | {"jobs": jobs}

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what `as_document` made."""
        jobs = tuple((job["id"], _held_of(job)) for job in document["jobs"])
        return cls(**{**document, "jobs": jobs})

    def room(self, gpus: Collection[Mapping[str, Any]]) -> Room:
        """Return the room of a worker with these GPUs, as `describe_gpus` has them."""
        offer = Offer(
            gpus=gpus_of(gpus),
            cpus=self.cpus,
            memory_gb=self.memory_gb,
            max_jobs=self.max_jobs,
            max_cpu_ranks=self.max_cpu_ranks,
            num_nodes=self.num_nodes,
        )
        return Room(offer, tuple(held for _, held in self.jobs))


def gpus_of(described: Collection[Mapping[str, Any]]) -> tuple[Gpu, ...]:
    """Return GPUs from their descriptions in a worker's row, with the memory that jobs may use."""
    return tuple(
        Gpu(one["index"], one["name"], one.get("memory_total_bytes", 0) / 1e9 * one.get("memory_fraction", 1.0))
        for one in described
    )


def _held_of(job: Mapping[str, Any]) -> Held:
    return Held(
        gpus=tuple(job["gpus"]),
        gpu_share=job.get("gpu_share", 1.0),
        cpus=job["cpus"],
        memory_gb=job["memory_gb"],
        num_nodes=job.get("num_nodes", 1),
        waiting_for=job.get("waiting_for"),
    )


def _uses_gpus(needs: Needs, offer: Offer) -> bool:
    if needs.device == "cpu" or needs.gpus == 0:
        return False
    return bool(offer.gpus) or needs.names_gpus


def _gpu_share(needs: Needs) -> float:
    return needs.gpus if needs.gpus is not None and 0 < needs.gpus < 1 else 1.0


def _num_gpus(needs: Needs) -> int:
    return ceil(needs.gpus or needs.num_ranks)


def _num_cpus(needs: Needs, offer: Offer) -> int:
    """Return the cores that a job has to itself. On GPUs, those that it asks for; on the CPU one a rank, or all."""
    if needs.cpus is not None:
        return needs.cpus
    return 0 if _uses_gpus(needs, offer) else min(needs.num_ranks, offer.cpus)


def _gpus_in_words(needs: Needs) -> str:
    share = _gpu_share(needs)
    words = f"{_num_gpus(needs)} GPUs" if share == 1 else f"{share:g} of a GPU"
    if needs.gpu_type is not None:
        words += f" of type {needs.gpu_type}"
    if needs.gpu_memory_gb is not None:
        words += f" with at least {needs.gpu_memory_gb:g} GB"
    if needs.gpus is None:
        words += ", one for each rank"
    return words


def _words(name: str) -> frozenset[str]:
    """Return the parts of a GPU's name: `A10` is none of those of `NVIDIA A100-SXM4-80GB`."""
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
