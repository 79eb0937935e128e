"""What a partition offers to one job at most, from what `sinfo` says of its nodes. Pure."""

import re
from collections.abc import Iterable

from apt_jobs.jobs.packing import Gpu, Offer

MAX_CPU_RANKS = 64
_GPUS = re.compile(r"(?:^|,)gpu(?::([A-Za-z][\w.-]*))?:(\d+)")


def offer_of(rows: Iterable[str], *, max_jobs: int, gpu_memory_gb: float) -> Offer | None:
    """Return the largest of what its nodes have, in whatever state; None: it has no nodes, or is gone.

    Args:
        rows: as `SlurmClient.nodes` returns them.
        max_jobs: most jobs at once of the worker, waiting in Slurm or running.
        gpu_memory_gb: of each GPU, which Slurm does not know; 0: nobody does.
    """
    cpus, memory_mb, gpus, num_nodes = 0, 0, dict[str, int](), 0
    for row in rows:
        number, node_cpus, node_mb, gres = (row.split("|") + [""] * 4)[:4]
        if not _whole(number):
            continue
        num_nodes += _whole(number)
        cpus, memory_mb = max(cpus, _whole(node_cpus)), max(memory_mb, _whole(node_mb))
        for kind, count in _GPUS.findall(gres):
            gpus[kind or "gpu"] = max(gpus.get(kind or "gpu", 0), int(count))
    if not num_nodes:
        return None
    names = [kind for kind in sorted(gpus) for _ in range(gpus[kind])]
    return Offer(
        gpus=tuple(Gpu(index, name, gpu_memory_gb) for index, name in enumerate(names)),
        cpus=cpus,
        memory_gb=round(memory_mb * 2**20 / 1e9, 1),
        max_jobs=max_jobs,
        max_cpu_ranks=min(MAX_CPU_RANKS, cpus),
        num_nodes=num_nodes,
    )


def why_closed(rows: Iterable[str]) -> str | None:
    """Return why the partition takes no jobs; None: it does."""
    states = {row.split("|")[-1].strip() for row in rows}
    return None if "up" in states else f"the partition of Slurm is {' and '.join(sorted(states))}: it takes no jobs"


def _whole(text: str) -> int:
    """Read `128` or `128+`, as `sinfo` writes where nodes differ."""
    digits = text.strip().rstrip("+")
    return int(digits) if digits.isdigit() else 0
