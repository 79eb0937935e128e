"""How much memory is free where a model runs."""

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
