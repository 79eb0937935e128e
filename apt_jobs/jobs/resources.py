"""What a training job asks of each machine that it runs on. 1 GB is 10**9 bytes, as makers of GPUs count."""

from typing import Annotated

from pydantic import Field, StringConstraints, field_validator

from apt_jobs.jobs.strict_model import Strict

MIN_GPU_SHARE = 0.05  # of one GPU
GpuType = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]


class Resources(Strict):
    """What a job takes of each machine that it runs on, for itself alone. A worker runs as many jobs as fit."""

    gpus: float | None = Field(
        None,
        ge=0,
        le=1_024,
        allow_inf_nan=False,
        description="GPUs on each machine, or a part of one, as 0.5, which other jobs share; null: one for each rank "
        "there, where the worker has GPUs; 0: none.",
    )
    gpu_type: GpuType | None = Field(
        None, description="Words of the GPU's name, as `H100` or `RTX 4090`; null: whatever the worker has."
    )
    gpu_memory_gb: float | None = Field(
        None,
        gt=0,
        le=10_000,
        description="Memory that each of its GPUs, or its part of one, has at least, in GB (10**9 bytes).",
    )
    cpus: int | None = Field(
        None,
        ge=1,
        le=4_096,
        description="CPU cores on each machine; null: one for each rank that trains on the CPU, at most what there is.",
    )
    memory_gb: float | None = Field(
        None, gt=0, le=1_000_000, description="Main memory on each machine, in GB (10**9 bytes); null: not counted."
    )

    @field_validator("gpus")
    @classmethod
    def _gpus_are_whole_or_a_part_of_one(cls, gpus: float | None) -> int | float | None:
        if gpus is None or gpus == int(gpus):
            return None if gpus is None else int(gpus)
        if not MIN_GPU_SHARE <= gpus < 1:
            raise ValueError(
                f"gpus={gpus:g} is neither a whole number nor a part of one GPU from {MIN_GPU_SHARE} to 0.99"
            )
        return round(gpus, 2)

    @property
    def gpu_share(self) -> float:
        """Part of each of its GPUs that it takes."""
        return self.gpus if self.gpus is not None and 0 < self.gpus < 1 else 1.0

    @property
    def names_gpus(self) -> bool:
        """Whether it cannot do without GPUs."""
        return bool(self.gpus) or self.gpu_type is not None or self.gpu_memory_gb is not None

    def require_suited(self, device: str, ranks_per_node: int, num_nodes: int) -> None:
        """Return if they go with the device and the ranks of a job.

        Raises:
            ValueError: they do not.
        """
        if self.gpu_share < 1 and (ranks_per_node > 1 or num_nodes > 1):
            raise ValueError(
                f"resources.gpus={self.gpus} is a part of a GPU, for one rank on one machine; the job has "
                f"{ranks_per_node * num_nodes} ranks on {num_nodes}"
            )
        if self.gpus and self.gpu_share == 1 and self.gpus < ranks_per_node:
            raise ValueError(f"resources.gpus={self.gpus} must be at least the {ranks_per_node} ranks of each machine")
        if device == "cuda" and self.gpus == 0:
            raise ValueError("resources.gpus=0 leaves no GPU for device='cuda'")
        if self.names_gpus and (device == "cpu" or self.gpus == 0):
            raise ValueError("resources ask for GPUs, and device='cpu' or resources.gpus=0 for none")
