"""What a training job asks of each machine that it runs on. 1 GB is 10**9 bytes, as makers of GPUs count."""

from typing import Annotated

from pydantic import Field, StringConstraints

from apt_jobs.jobs.strict_model import Strict

GpuType = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]


class Resources(Strict):
    """What a job takes of each machine that it runs on, for itself alone. A worker runs as many jobs as fit."""

    gpus: int | None = Field(
        None,
        ge=0,
        le=1_024,
        description="GPUs on each machine; null: one for each rank there, where the worker has GPUs; 0: none.",
    )
    gpu_type: GpuType | None = Field(
        None, description="Words of the GPU's name, as `H100` or `RTX 4090`; null: whatever the worker has."
    )
    gpu_memory_gb: float | None = Field(
        None, gt=0, le=10_000, description="Memory that each of its GPUs has at least, in GB (10**9 bytes)."
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

    @property
    def names_gpus(self) -> bool:
        """Whether it cannot do without GPUs."""
        return bool(self.gpus) or self.gpu_type is not None or self.gpu_memory_gb is not None

    def require_suited(self, device: str, ranks_per_node: int) -> None:
        """Return if they go with the device and the ranks of a job.

        Raises:
            ValueError: they do not.
        """
        if self.gpus and self.gpus < ranks_per_node:
            raise ValueError(f"resources.gpus={self.gpus} must be at least the {ranks_per_node} ranks of each machine")
        if device == "cuda" and self.gpus == 0:
            raise ValueError("resources.gpus=0 leaves no GPU for device='cuda'")
        if self.names_gpus and (device == "cpu" or self.gpus == 0):
            raise ValueError("resources ask for GPUs, and device='cpu' or resources.gpus=0 for none")
