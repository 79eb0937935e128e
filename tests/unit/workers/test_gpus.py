"""GPUs that are not there, named wrongly or broken are errors; a machine without a driver is a CPU worker."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from apt_jobs.errors import InvalidInput, Unavailable
from apt_jobs.workers import gpus
from apt_jobs.workers.gpus import describe_gpus, find_gpus, parse_gpus


def raises(code: int) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise pynvml.NVMLError(code)

    return fail


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two GPUs that answer; `tmp_path/dev` and `tmp_path/pci` are what the kernel shows: nothing."""
    for name in ("dev", "pci"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(gpus, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(total=2, used=1))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetIndex", lambda handle: handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: {"GPU-b": 1}[uuid])
    return tmp_path


@pytest.mark.parametrize(("text", "indexes"), [("0", [0]), ("1,0", [1, 0]), (" 0 , 1 ", [0, 1]), ("", []), (" ", [])])
def test_a_list_of_indexes_is_read(text: str, indexes: list[int]) -> None:
    assert parse_gpus(text) == indexes


@pytest.mark.parametrize("text", ["x", "0,x", "-1", "0,,1", "0,", ",", "0-1", "0.0", "1e0", "٣", "1_0", "all", "0 1"])
def test_what_is_no_list_of_indexes_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="is no list of GPU indexes; write 0,1"):
        parse_gpus(text)


@pytest.mark.parametrize("text", ["0,0", "1,0,1", "0,00"])
def test_a_gpu_that_is_named_twice_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="names a GPU twice"):
        parse_gpus(text)


def test_all_gpus_are_used_unless_some_are_named() -> None:
    assert find_gpus(None) == [0, 1]
    assert find_gpus([1]) == [1]
    assert find_gpus([]) == []


@pytest.mark.parametrize("asked", [[7], [0, 2], [2, 0]])
def test_a_gpu_that_is_not_there_is_named_with_those_that_are(asked: list[int]) -> None:
    with pytest.raises(Unavailable, match="is not on this machine, which has: 0, 1"):
        find_gpus(asked)


def test_a_machine_without_a_driver_is_a_cpu_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
        monkeypatch.setattr(pynvml, "nvmlInit", raises(code))
        assert find_gpus(None) == find_gpus([]) == []
        with pytest.raises(Unavailable, match=r"GPU 0 is asked for, and .* no NVIDIA driver"):
            find_gpus([0])


@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_UNKNOWN,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_IRQ_ISSUE,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    ],
)
@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount"])
@pytest.mark.parametrize("asked", [None, [0]])
def test_a_driver_that_does_not_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, code: int, call: str, asked: list[int] | None
) -> None:
    monkeypatch.setattr(pynvml, call, raises(code))
    with pytest.raises(Unavailable, match="driver of this machine does not answer"):
        find_gpus(asked)
    assert find_gpus([]) == []  # to train on the CPU is said, not found


@pytest.mark.parametrize("device", ["nvidiactl", "nvidia0", "nvidia12"])
@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_driver_without_its_library_is_an_error(
    monkeypatch: pytest.MonkeyPatch, machine: Path, device: str, code: int
) -> None:
    (machine / "dev" / device).touch()
    monkeypatch.setattr(pynvml, "nvmlInit", raises(code))
    with pytest.raises(Unavailable, match="does not answer"):
        find_gpus(None)


@pytest.mark.parametrize(
    ("vendor", "kind", "is_gpu"),
    [("0x10de", "0x030200", True), ("0x10de", "0x020000", False), ("0x8086", "0x030000", False)],
)
def test_a_card_whose_driver_is_not_loaded_is_an_error(
    monkeypatch: pytest.MonkeyPatch, machine: Path, vendor: str, kind: str, is_gpu: bool
) -> None:
    (machine / "pci" / "0000:01:00.0").mkdir()
    (machine / "pci" / "0000:01:00.0" / "vendor").write_text(f"{vendor}\n")
    (machine / "pci" / "0000:01:00.0" / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(pynvml, "nvmlInit", raises(pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    if is_gpu:
        with pytest.raises(Unavailable, match="does not answer"):
            find_gpus(None)
    else:
        assert find_gpus(None) == []


@pytest.mark.parametrize("asked", [None, [1], [0, 1]])
@pytest.mark.parametrize("call", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"])
def test_a_lost_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch, asked: list[int] | None, call: str) -> None:
    works = getattr(pynvml, call)
    lost = raises(pynvml.NVML_ERROR_GPU_IS_LOST)
    monkeypatch.setattr(pynvml, call, lambda index: lost() if index == 1 else works(index))
    with pytest.raises(Unavailable, match="GPU 1 does not answer"):
        find_gpus(asked)
    assert find_gpus([0]) == [0]


@pytest.mark.parametrize(("visible", "found"), [("", []), ("-1", []), ("1", [1]), ("1, 0", [1, 0]), ("GPU-b", [1])])
def test_gpus_that_this_process_may_not_see_are_not_used(
    monkeypatch: pytest.MonkeyPatch, visible: str, found: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpus(None) == found
    assert find_gpus([0]) == [0]  # an option says more than the environment


def test_visible_devices_that_are_not_there_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(Unavailable, match="GPU 7 is not on this machine"):
        find_gpus(None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", raises(pynvml.NVML_ERROR_NOT_FOUND))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-gone")
    with pytest.raises(Unavailable, match="CUDA_VISIBLE_DEVICES names 'GPU-gone'"):
        find_gpus(None)


def test_a_gpu_that_is_lost_later_is_described_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", raises(pynvml.NVML_ERROR_GPU_IS_LOST))
    assert describe_gpus([0])[0]["name"].startswith("unreadable: ")


@pytest.mark.parametrize("command", [["train"], ["node", "--head=h"]])
@pytest.mark.parametrize(("option", "words"), [("7", "GPU 7"), ("0,0", "names a GPU twice"), ("x", "is no list")])
def test_a_worker_of_a_gpu_that_is_not_there_does_not_start(
    tmp_path: Path, command: list[str], option: str, words: str
) -> None:
    environment = {**os.environ, "APT_JOBS_DATA_DIR": str(tmp_path)}
    line = [sys.executable, "-m", "apt_jobs", "worker", *command, f"--gpus={option}"]
    ended = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
