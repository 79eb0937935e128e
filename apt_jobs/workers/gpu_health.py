"""Whether the GPUs of a worker are sound, by NVIDIA's management library: heat, memory errors, slowdowns.

What a GPU or its driver does not measure is None, and says nothing against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pynvml


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU now."""

    index: int
    temperature_celsius: float | None
    max_temperature_celsius: float | None  # at which it slows down
    power_watts: float | None
    num_uncorrected_ecc_errors: int | None  # since the driver was loaded
    num_remapped_rows_failed: int | None  # 1: its memory cannot be repaired any more
    is_throttled: bool | None  # by hardware: heat or power
    lost: str | None  # why it does not answer at all; None: it does


def read_gpus(indexes: Sequence[int]) -> list[GpuReading]:
    """Return what each GPU says of itself; one that does not answer says why."""
    return [_read(index) for index in indexes]


def _read(index: int) -> GpuReading:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as exc:
        return GpuReading(index, None, None, None, None, None, None, str(exc))
    reasons = _asked(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    slowed = int(pynvml.nvmlClocksThrottleReasonHwSlowdown)
    power_mw = _asked(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    errors = _asked(
        lambda: pynvml.nvmlDeviceGetTotalEccErrors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        )
    )
    return GpuReading(
        index=index,
        temperature_celsius=_asked(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        max_temperature_celsius=_asked(
            lambda: pynvml.nvmlDeviceGetTemperatureThreshold(handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        ),
        power_watts=None if power_mw is None else power_mw / 1000.0,
        num_uncorrected_ecc_errors=None if errors is None else int(errors),
        num_remapped_rows_failed=_failed_rows(handle),
        is_throttled=None if reasons is None else bool(int(reasons) & slowed),
        lost=None,
    )


def _failed_rows(handle: object) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetRemappedRows(handle)[3])
    except pynvml.NVMLError:
        return None


def _asked(question: Callable[[], float]) -> float | None:
    try:
        return question()
    except pynvml.NVMLError:
        return None
