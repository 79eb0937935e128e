"""How much GPU memory a rank of the built-in trainer takes, from the shape of its model alone: an estimate.

Weights, gradients and optimizer are counted exactly. Activations are those that a Llama keeps for its backward pass
with fused attention, after Korthikanti et al. 2022 (arXiv:2205.05198, section 4), without dropout masks.
"""

from dataclasses import dataclass, fields

from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.training_options import TrainingOptions

OPTIMIZER_COPIES = {"adamw": 2.0, "lion": 1.0, "muon": 1.0, "adafactor": 0.01, "adamw_8bit": 0.52}  # of the weights
QUANTIZED_BYTES = 0.516  # of a weight: 4 bits, and a scale of 8 bits for each 64 (Dettmers et al. 2023, section 3)
CONTEXT_BYTES = 600_000_000  # of CUDA, cuBLAS and the allocator
MAX_CHUNK_LOGITS = 1 << 27  # as `training/loss.py` computes them at once


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on."""

    num_parameters: int
    width: int
    num_layers: int
    hidden: int  # width of the MLP
    key_value_width: int
    vocab_size: int
    context: int  # tokens of a sequence

    @classmethod
    def of_config(cls, config: APTConfig) -> "ModelShape":
        """Return the shape of a model that is trained from nothing."""
        heads = config.num_key_value_heads or config.num_attention_heads
        return cls(
            num_parameters=config.num_parameters,
            width=config.d_model,
            num_layers=config.num_layers,
            hidden=config.feed_forward_size,
            key_value_width=config.d_model // config.num_attention_heads * heads,
            vocab_size=config.vocab_size,
            context=config.max_seq_len,
        )


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int  # average, reference model, buckets, weights that are cast or gathered, CUDA itself

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def num_trainable(shape: ModelShape, options: TrainingOptions) -> int:
    """Return about how many parameters are trained: of an adapter of all linear layers its two matrices for each."""
    if options.lora is None:
        return shape.num_parameters
    width, hidden, key_value = shape.width, shape.hidden, shape.key_value_width
    sides = {
        "q": 2 * width,
        "k": width + key_value,
        "v": width + key_value,
        "o": 2 * width,
        "mlp": 3 * (width + hidden),
    }
    return shape.num_layers * options.lora.r * sum(sides.values())


def rank_memory(shape: ModelShape, options: TrainingOptions, num_ranks: int, *, on_gpu: bool) -> RankMemory:
    """Estimate what a rank takes at its largest, in the middle of a step."""
    is_sharded, trained = options.sharding == "fsdp2" and num_ranks > 1, num_trainable(shape, options)
    shards = num_ranks if is_sharded else 1
    weight_bytes = 2 if options.precision == "bf16-true" else 4
    is_mixed = options.precision in ("bf16", "fp16") or (options.precision == "auto" and on_gpu)
    compute_bytes = 2 if is_mixed or weight_bytes == 2 else 4
    weights, cast = weight_bytes * shape.num_parameters, shape.num_parameters
    if options.lora is not None and options.lora.quantization is not None:
        outside = 2 * shape.vocab_size * shape.width  # embedding and output stay as they are
        weights = int(QUANTIZED_BYTES * max(shape.num_parameters - outside, 0)) + weight_bytes * outside
        cast = outside  # of the others one layer at a time
    copies = OPTIMIZER_COPIES[options.optimizer]
    other = CONTEXT_BYTES if on_gpu else 0
    if options.ema_decay is not None:
        other += 4 * trained // shards
    if options.objective == "dpo":
        other += weights if cast < shape.num_parameters else 4 * shape.num_parameters
    if is_mixed:  # a cast weight is kept for the backward pass; of sharded ones two blocks are there at once
        other += 2 * cast // (shape.num_layers if is_sharded else 1)
    if num_ranks > 1 and not is_sharded:
        other += 4 * trained  # buckets of DDP
    return RankMemory(
        weights=weights // shards,
        gradients=weight_bytes * trained // shards,
        optimizer=int(copies * weight_bytes * trained) // shards,
        activations=_activations(shape, options, compute_bytes, weight_bytes),
        logits=_logits(shape, options, compute_bytes, on_gpu=on_gpu),
        other=other,
    )


def step_tokens(shape: ModelShape, options: TrainingOptions) -> int:
    """Return the tokens of a micro batch on one rank."""
    return options.batch_size * shape.context * (2 if options.objective == "dpo" else 1)


def _activations(shape: ModelShape, options: TrainingOptions, compute_bytes: int, weight_bytes: int) -> int:
    """Return what the blocks keep: the residual stream in the type of the weights, all else in that of the products."""
    inside = (
        5 * shape.width + 2 * shape.key_value_width + 3 * shape.hidden
    )  # norms, q, attention; k, v; gate, up, product
    block = compute_bytes * inside + weight_bytes * 2 * shape.width
    tokens = step_tokens(shape, options)
    if options.activation_checkpointing:
        return tokens * (shape.num_layers * weight_bytes * shape.width + block)
    return tokens * shape.num_layers * block


def _logits(shape: ModelShape, options: TrainingOptions, compute_bytes: int, *, on_gpu: bool) -> int:
    """Return what head and loss keep: compiled in the type of the products, else their softmax in float32."""
    is_compiled = options.compile == "on" or (options.compile == "auto" and on_gpu)
    number = step_tokens(shape, options) * shape.vocab_size
    return number * (compute_bytes if is_compiled else 4) + 4 * min(number, MAX_CHUNK_LOGITS)
