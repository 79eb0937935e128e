"""Preflight of a job: what it would take and which worker could run it, before anything is queued.

`submit_job` refuses by it what fits on no GPU that there is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy.orm import Session

from apt_jobs.artifacts.datasets import find_dataset
from apt_jobs.artifacts.model_facts import model_facts
from apt_jobs.artifacts.models import CONFIG, model_folders, resolve_model
from apt_jobs.db.models import WorkerRow
from apt_jobs.db.workers import list_workers
from apt_jobs.errors import AptJobsError, InvalidInput
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.jobs.memory import ModelShape, RankMemory, num_trainable, rank_memory, step_tokens
from apt_jobs.jobs.needs import Needs, decode_needs, needs_of
from apt_jobs.jobs.packing import Gpu, RoomReport, gpus_of
from apt_jobs.jobs.spec import BUILTIN_DATASET, BUILTIN_ENTRY_POINT, GenerateSpec, TrainSpec, queue_of
from apt_jobs.operations.data_directory import free_bytes_of
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.settings import Settings

BYTES_PER_TOKEN = {DatasetFormat.UINT16: 2.0, DatasetFormat.UINT32: 4.0, DatasetFormat.NPY: 2.0}
BYTES_OF_TEXT = 4.0  # about, of a token
BUILTIN_BYTES = 700_000
_COMPRESSED = 3.0  # about how much larger a text is than its file


@dataclass(frozen=True, slots=True)
class WorkerFit:
    """Whether a worker could ever run the job."""

    worker: str
    fits: bool
    why_not: str | None


@dataclass(slots=True)
class Preflight:
    """What is None is not known: of a user script, or before a model can be read."""

    workers: list[WorkerFit]
    memory: RankMemory | None = None
    num_parameters: int | None = None
    num_trainable_parameters: int | None = None
    num_tokens: int | None = None  # of the data sets, about
    num_steps: int | None = None
    tokens_per_step: int | None = None
    checkpoint_bytes: int | None = None  # of one
    checkpoints_bytes: int | None = None  # of all that are kept at once
    disk_free_bytes: int | None = None
    advice: list[str] = field(default_factory=list)  # what would make it fit

    @property
    def fits(self) -> bool | None:
        """Whether any worker could run it; None: none is alive."""
        return any(row.fits for row in self.workers) if self.workers else None


def preflight(session: Session, settings: Settings, spec: TrainSpec | GenerateSpec) -> Preflight:
    """Estimate a job. What it refers to has been checked."""
    alive = list_workers(session, alive_within_s(settings))
    rows = [row for row in alive if row.kind == spec.kind and queue_of(spec) in row.queues]
    if isinstance(spec, GenerateSpec):
        return Preflight([WorkerFit(row.name, True, None) for row in rows])
    shape = _shape_of(session, settings, spec)
    found = Preflight([_fit(row, spec, shape) for row in rows])
    if shape is not None:
        needs, gpus = decode_needs(needs_of(spec)), [gpu for row in rows for gpu in gpus_of(row.gpus)]
        _measure(found, settings, spec, shape, on_gpu=needs.names_gpus or _may_use_gpus(needs, gpus))
        largest = max((gpu.memory_gb for gpu in gpus), default=0.0)
        if found.fits is False and found.memory is not None and 0 < largest * 1e9 < found.memory.total:
            found.advice = advice_for(spec, shape, int(largest * 1e9))
    return found


def require_fitting(session: Session, settings: Settings, spec: TrainSpec | GenerateSpec) -> None:
    """Return unless every worker that could take a training has GPUs that are too small for it.

    Raises:
        InvalidInput: they are; the message says how much it takes, and what would fit.
    """
    if isinstance(spec, GenerateSpec):
        return
    found = preflight(session, settings, spec)
    if found.advice and found.memory is not None:
        raise InvalidInput(
            f"the job takes about {_gb(found.memory.total)} of memory on each GPU, more than any GPU of the queue "
            f"{queue_of(spec)!r} has; what would fit: {'; '.join(found.advice)}"
        )


def _measure(found: Preflight, settings: Settings, spec: TrainSpec, shape: ModelShape, *, on_gpu: bool) -> None:
    """Fill in what follows from the model and the data sets."""
    options, trained = spec.training, num_trainable(shape, spec.training)
    memory = found.memory = rank_memory(shape, options, spec.num_ranks, on_gpu=on_gpu)
    found.num_parameters, found.num_trainable_parameters = shape.num_parameters, trained
    found.tokens_per_step = step_tokens(shape, options) * options.gradient_accumulation_steps * spec.num_ranks
    found.num_tokens = sum(_num_tokens(settings, one.name) for one in spec.mixture)
    held_out = options.validation_fraction if spec.validation_dataset is None else 0.0
    steps = int(found.num_tokens * (1.0 - held_out)) // found.tokens_per_step * options.epochs
    found.num_steps = steps if options.max_steps is None else min(steps, options.max_steps)
    weight_bytes = 2 if options.precision == "bf16-true" else 4
    average = 4 * trained if options.ema_decay is not None else 0
    saved = trained if options.lora is not None else shape.num_parameters
    found.checkpoint_bytes = weight_bytes * saved + memory.optimizer * _num_shards(spec) + average
    num_kept = options.keep_checkpoints + 1  # the best one
    if options.keep_every_steps is not None:
        num_kept += found.num_steps // options.keep_every_steps
    num_saved = math.ceil(found.num_steps / options.checkpoint_every_steps)
    found.checkpoints_bytes = found.checkpoint_bytes * max(min(num_saved, num_kept), 1)
    found.disk_free_bytes = free_bytes_of(settings)


def _fit(row: WorkerRow, spec: TrainSpec, shape: ModelShape | None) -> WorkerFit:
    """Tell whether a worker offers what the job asks for, and GPUs that are large enough."""
    if row.room is None:
        return WorkerFit(row.name, True, None)
    needs, room = decode_needs(needs_of(spec)), RoomReport.of_document(row.room).room(row.gpus)
    gpus, lacks = room.offer.gpus, room.lacks(needs)
    if lacks is None and shape is not None and _may_use_gpus(needs, gpus):
        total = rank_memory(shape, spec.training, spec.num_ranks, on_gpu=True).total
        num_large = sum(gpu.suits(needs) and (not gpu.memory_gb or gpu.memory_gb * 1e9 >= total) for gpu in gpus)
        if num_large < needs.num_ranks:
            largest = max(gpu.memory_gb for gpu in gpus)
            lacks = (
                f"a rank takes about {_gb(total)} of GPU memory: {needs.num_ranks} such GPUs are needed, and this "
                f"worker has {num_large}, the largest of {largest:.1f} GB"
            )
    return WorkerFit(row.name, lacks is None, lacks)


def _may_use_gpus(needs: Needs, gpus: Sequence[Gpu]) -> bool:
    return bool(gpus) and needs.device != "cpu" and needs.gpus != 0


def _num_shards(spec: TrainSpec) -> int:
    return spec.num_ranks if spec.training.sharding == "fsdp2" else 1


def advice_for(spec: TrainSpec, shape: ModelShape, memory_bytes: int) -> list[str]:
    """Return changes of `training`, each of which would let a rank fit into so much memory."""
    options = spec.training

    def fits(**change: Any) -> bool:
        changed = options.model_copy(update=change)
        return rank_memory(shape, changed, spec.num_ranks, on_gpu=True).total <= memory_bytes

    found = []
    num_sequences = options.batch_size * options.gradient_accumulation_steps
    halves = [options.batch_size >> number for number in range(1, options.batch_size.bit_length())]
    if batch_size := next((half for half in halves if fits(batch_size=half)), None):
        accumulation = math.ceil(num_sequences / batch_size)
        found.append(f"batch_size={batch_size} with gradient_accumulation_steps={accumulation}")
    least: dict[str, Any] = {"batch_size": 1, "activation_checkpointing": True}
    if fits(activation_checkpointing=True):
        found.append("activation_checkpointing=true")
    elif not found and fits(**least):
        found.append("batch_size=1 with activation_checkpointing=true")
    if not found and fits(**least, precision="bf16-true", ema_decay=None):
        found.append('precision="bf16-true" with batch_size=1 and activation_checkpointing=true')
    if spec.num_ranks > 1 and options.sharding == "ddp" and fits(**least, sharding="fsdp2"):
        found.append('sharding="fsdp2" with batch_size=1 and activation_checkpointing=true')
    return found or ['a smaller model, an adapter (training.lora), or more ranks with sharding="fsdp2"']


def _shape_of(session: Session, settings: Settings, spec: TrainSpec) -> ModelShape | None:
    if spec.entry_point != BUILTIN_ENTRY_POINT:
        return None
    if spec.base_model is None:
        return ModelShape.of_config(spec.model)
    try:
        folder = model_folders(session, settings, resolve_model(session, spec.base_model)).folder
        config = orjson.loads((folder / CONFIG).read_bytes())
    except (AptJobsError, OSError, ValueError):
        return None
    return _shape_of_folder(folder, config, spec.model.max_seq_len) if isinstance(config, dict) else None


def _shape_of_folder(folder: Path, config: dict[str, Any], asked_tokens: int) -> ModelShape | None:
    """Read the sizes by the names that Hugging Face's configurations have for them; None: some are not there."""
    facts, of_text = model_facts(folder), config.get("text_config")
    config = {**config, **(of_text if isinstance(of_text, dict) else {})}
    width = _first_size(config, "hidden_size", "n_embd", "d_model")
    num_layers = _first_size(config, "num_hidden_layers", "n_layer")
    if width is None or num_layers is None or not facts.num_parameters:
        return None
    heads = _first_size(config, "num_attention_heads", "n_head") or 1
    head_width = _first_size(config, "head_dim") or max(width // heads, 1)
    return ModelShape(
        num_parameters=facts.num_parameters,
        width=width,
        num_layers=num_layers,
        hidden=_first_size(config, "intermediate_size", "n_inner") or 4 * width,
        key_value_width=head_width * (_first_size(config, "num_key_value_heads") or heads),
        vocab_size=_first_size(config, "vocab_size") or 0,
        context=min(asked_tokens, facts.context_tokens or asked_tokens),
    )


def _first_size(config: dict[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)


def _num_tokens(settings: Settings, name: str) -> int:
    """Return about how many tokens a data set has: exactly, if it holds token ids."""
    if name == BUILTIN_DATASET:
        return int(BUILTIN_BYTES / BYTES_OF_TEXT)
    try:
        record = find_dataset(settings.datasets_dir, name)
    except (AptJobsError, OSError):
        return 0
    size = record.size_bytes * (_COMPRESSED if record.filename.endswith((".gz", ".zst")) else 1.0)
    return int(size / BYTES_PER_TOKEN.get(record.format, BYTES_OF_TEXT))


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
