"""What this machine has of CPU cores and memory for trainings, containers' limits included."""

import math
import os
from pathlib import Path

from apt_jobs.settings import Settings

CGROUP = Path("/sys/fs/cgroup")


def offered_cpus(settings: Settings) -> int:
    """Return the cores that training jobs share: `worker_cpus`, or all that this process may use."""
    if settings.worker_cpus:
        return settings.worker_cpus
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _limit("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        usable = min(usable, max(1, math.floor(int(quota) / int(period))))
    return usable


def offered_memory_gb(settings: Settings) -> float:
    """Return the memory that training jobs share, in GB: `worker_memory_gb`, or all of this machine."""
    if settings.worker_memory_gb:
        return settings.worker_memory_gb
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _limit("memory.max")
    if limit.isdigit():
        total_bytes = min(total_bytes, int(limit))
    return round(total_bytes / 1e9, 1)


def _limit(name: str) -> str:
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""  # no control group of version 2, or no limit
