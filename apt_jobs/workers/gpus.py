"""Which GPUs this machine has, through NVIDIA's management library: nothing is loaded onto them."""

from typing import Any

import pynvml


def list_gpus() -> list[int]:
    """Indexes of the NVIDIA GPUs; empty without GPUs or driver."""
    try:
        pynvml.nvmlInit()
        return list(range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return []


def describe_gpus(indexes: list[int]) -> list[dict[str, Any]]:
    """`index`, `name`, `memory_total_bytes`, `memory_used_bytes` and `utilization_percent` of each GPU."""
    described = []
    for index in indexes:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            described.append(
                {
                    "index": index,
                    "name": str(pynvml.nvmlDeviceGetName(handle)),
                    "memory_total_bytes": int(memory.total),
                    "memory_used_bytes": int(memory.used),
                    "utilization_percent": int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
                }
            )
        except pynvml.NVMLError as exc:
            described.append({"index": index, "name": f"unreadable: {exc}"})
    return described
