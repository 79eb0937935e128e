"""How much memory is free where a model runs."""

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_reserved(device)
        return int(min(free, own))
    return int(psutil.virtual_memory().available)
