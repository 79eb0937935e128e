"""What a job needs of a worker, as one short text in its row: jobs with the same text fit the same workers.

A claim looks at the first job of each text, so it costs what the queue has of different needs, not what it has of jobs.
"""

import json
import math
from dataclasses import asdict, dataclass, fields

from apt_jobs.jobs.spec import GenerateSpec, TrainSpec


@dataclass(frozen=True, slots=True)
class Needs:
    """What each machine has to offer. None: not asked for."""

    num_ranks: int = 1  # on one machine
    num_nodes: int = 1
    device: str = "auto"
    gpus: int | float | None = None  # on one machine; below 1: a part of one
    gpu_type: str | None = None
    gpu_memory_gb: float | None = None
    cpus: int | None = None
    memory_gb: float | None = None
    time_limit_s: int | None = None  # rounded up by at most an eighth, so that there are few different ones

    @property
    def names_gpus(self) -> bool:
        """Whether it cannot do without GPUs."""
        named = bool(self.gpus) or self.gpu_type is not None or self.gpu_memory_gb is not None
        return named or self.device == "cuda"


NO_NEEDS = ""  # of a generation job: its worker serves many at once


def needs_of(spec: TrainSpec | GenerateSpec) -> str:
    """Return the text for the row of a job."""
    if isinstance(spec, GenerateSpec):
        return NO_NEEDS
    asked = spec.resources
    return encode_needs(
        Needs(
            num_ranks=spec.ranks_per_node,
            num_nodes=spec.num_nodes,
            device=spec.device,
            gpus=asked.gpus,
            gpu_type=asked.gpu_type,
            gpu_memory_gb=asked.gpu_memory_gb,
            cpus=asked.cpus,
            memory_gb=asked.memory_gb,
            time_limit_s=None if spec.time_limit_s is None else _rounded_up(spec.time_limit_s),
        )
    )


def encode_needs(needs: Needs) -> str:
    """Return JSON of what differs from the defaults, in the order of the fields."""
    usual = Needs()
    given = {name: value for name, value in asdict(needs).items() if value != getattr(usual, name)}
    return json.dumps(given, separators=(",", ":"))


def decode_needs(text: str) -> Needs:
    """Read what `encode_needs` wrote; of a row from before there were needs, those of one rank."""
    known = {field.name for field in fields(Needs)}
    found = json.loads(text) if text else {}
    return Needs(**{name: value for name, value in found.items() if name in known})


def _rounded_up(seconds: float) -> int:
    """Round up to four significant binary digits: at most an eighth more, some 200 values in all."""
    whole = max(60, math.ceil(seconds))
    step = 1 << max(0, whole.bit_length() - 4)
    return -(-whole // step) * step
