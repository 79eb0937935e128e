"""`POST /api/jobs?dry_run=true`: what a job would take, and which workers could run it. Nothing is queued."""

from dataclasses import asdict

from pydantic import BaseModel, Field

from apt_jobs.operations.preflight import Preflight


class RankMemoryAnswer(BaseModel):
    """About how many bytes of GPU memory (without GPUs: of main memory) one rank takes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int = Field(description="Average, reference model, buckets, weights that are cast, CUDA itself.")
    total: int


class WorkerFitAnswer(BaseModel):
    worker: str
    fits: bool
    why_not: str | None


class PreflightAnswer(BaseModel):
    """What is null is not known: of user scripts, of generation, or of a model that cannot be read."""

    object: str = "preflight"
    fits: bool | None = Field(description="Whether a worker could run it, now or later; null: none is alive.")
    workers: list[WorkerFitAnswer] = Field(description="Those of the queue that are alive.")
    advice: list[str] = Field(description="Options of `training` that would make it fit, if no GPU is large enough.")
    memory_per_rank_bytes: RankMemoryAnswer | None
    num_parameters: int | None
    num_trainable_parameters: int | None
    num_tokens: int | None = Field(description="About how many the data sets have.")
    tokens_per_step: int | None
    num_steps: int | None = Field(description="About how many there would be.")
    checkpoint_bytes: int | None = Field(description="Of one checkpoint.")
    checkpoints_bytes: int | None = Field(description="Of all checkpoints that are kept at once.")
    disk_free_bytes: int | None


def preflight_answer(found: Preflight) -> PreflightAnswer:
    """Show a preflight as REST does."""
    memory = None if found.memory is None else {**asdict(found.memory), "total": found.memory.total}
    values = {name: value for name, value in asdict(found).items() if name != "memory"}
    return PreflightAnswer.model_validate({**values, "fits": found.fits, "memory_per_rank_bytes": memory})
