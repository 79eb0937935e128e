"""Collectives of bytes, for what is no tensor. torch's own object collectives unpickle what other nodes send.

All ranks take part in each. Lengths go first, as ranks do not know those of others.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_bytes(data: bytes, device: torch.device) -> bytes:
    """Return rank 0's `data` on every rank; what others pass is not looked at.

    Args:
        data: what rank 0 sends.
        device: where the process group's tensors live.
    """
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    dist.broadcast(length, src=0)
    sent = _as_tensor(data, device) if dist.get_rank() == 0 else _empty(int(length), device)
    dist.broadcast(sent, src=0)
    return _as_bytes(sent)


def gather_bytes(data: bytes, device: torch.device) -> list[bytes] | None:
    """Return every rank's `data`, in order of rank, on rank 0, and None on the others.

    Args:
        data: what this rank sends.
        device: where the process group's tensors live.
    """
    lengths = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    lengths[dist.get_rank()] = len(data)
    dist.all_reduce(lengths)
    longest = int(lengths.max())
    sent = torch.cat([_as_tensor(data, device), _empty(longest - len(data), device)])
    received = [_empty(longest, device) for _ in lengths] if dist.get_rank() == 0 else None
    dist.gather(sent, received)
    if received is None:
        return None
    return [_as_bytes(part)[:length] for part, length in zip(received, lengths.tolist(), strict=True)]


def _as_tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.tensor(bytearray(data), dtype=torch.uint8, device=device)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _empty(length: int, device: torch.device) -> Tensor:
    return torch.zeros(length, dtype=torch.uint8, device=device)
