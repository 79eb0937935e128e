"""Which GPUs this machine has, through NVIDIA's management library: nothing is loaded onto them.

A machine without an NVIDIA driver is a CPU worker. One whose driver does not answer is broken: to train on the CPU
there would be a fault that nobody sees.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pynvml

from apt_jobs.errors import InvalidInput, Unavailable

DEVICES = Path("/dev")
PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA_PCI_VENDOR = "0x10de"
DISPLAY_PCI_CLASS = "0x03"  # VGA and 3D controllers; NVIDIA makes network cards as well
CPU_ADVICE = "mend it, or use the CPU: CUDA_VISIBLE_DEVICES='' (of a training worker also --gpus '')"


def parse_gpus(text: str) -> list[int]:
    """Read a list of GPU indexes as `0,1`; an empty one names no GPU.

    Raises:
        InvalidInput: it is no such list, or names a GPU twice.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidInput(f"{text!r} is no list of GPU indexes; write 0,1, or '' for none")
    indexes = [int(part) for part in parts]
    if len(set(indexes)) < len(indexes):
        raise InvalidInput(f"{text!r} names a GPU twice; each can serve one rank")
    return indexes


def find_gpus(asked: Sequence[int] | None) -> list[int]:
    """Return the indexes of the GPUs to use, each of which answers: those asked for, or all that this process may see.

    Empty: none is asked for, or there is no NVIDIA driver.

    Raises:
        Unavailable: the driver or a GPU does not answer, or one that is asked for is not there.
    """
    if asked is not None and not asked:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if asked is None else None
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    num_gpus = _count()
    if num_gpus is None:
        if asked is None and visible is None:
            return []
        names = visible if asked is None else ", ".join(map(str, asked))
        raise Unavailable(f"GPU {names} is asked for, and this machine has no NVIDIA driver")
    indexes = list(range(num_gpus))
    if asked is not None:
        indexes = list(asked)
    elif visible is not None:
        indexes = [_index_of(name.strip()) for name in visible.split(",")]
    for index in indexes:
        if not 0 <= index < num_gpus:
            has = ", ".join(map(str, range(num_gpus))) or "none"
            raise Unavailable(f"GPU {index} is not on this machine, which has: {has}")
        _require_answer(index)
    return indexes


def describe_gpus(indexes: Sequence[int], memory_fractions: Mapping[int, float] | None = None) -> list[dict[str, Any]]:
    """Return `index`, `name`, `memory_total_bytes`, `memory_used_bytes` and `utilization_percent` of each GPU.

    And `memory_fraction` of those that the worker has a part of.
    """
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
        if (fraction := (memory_fractions or {}).get(index)) is not None:
            described[-1]["memory_fraction"] = fraction
    return described


def _count() -> int | None:
    """Return how many GPUs there are; None: this machine has no NVIDIA driver."""
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as exc:
        if isinstance(exc, pynvml.NVMLError_LibraryNotFound) and not _has_device_files():
            return None
        is_off = isinstance(exc, pynvml.NVMLError_DriverNotLoaded)
        if is_off and not _has_device_files() and not _has_nvidia_card():  # an image with the library, for any machine
            return None
        raise Unavailable(f"the NVIDIA driver of this machine does not answer ({exc}); {CPU_ADVICE}") from exc


def _require_answer(index: int) -> None:
    try:
        pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError as exc:
        raise Unavailable(f"GPU {index} does not answer ({exc}); {CPU_ADVICE}, or name others, as --gpus 0,1") from exc


def _index_of(name: str) -> int:
    """Return the index behind a name in CUDA_VISIBLE_DEVICES: itself, or the UUID of a GPU."""
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return int(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(name)))
    except pynvml.NVMLError as exc:
        raise Unavailable(f"CUDA_VISIBLE_DEVICES names {name!r}, which is no GPU of this machine ({exc})") from exc


def _has_device_files() -> bool:
    """Return whether the driver, or who started this container, gave us a GPU."""
    return (DEVICES / "nvidiactl").exists() or any(DEVICES.glob("nvidia[0-9]*"))


def _has_nvidia_card() -> bool:
    for device in PCI_DEVICES.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text()
        except OSError:
            continue
        if vendor == NVIDIA_PCI_VENDOR and kind.startswith(DISPLAY_PCI_CLASS):
            return True
    return False
