"""How the built-in trainer trains: every option with its type, bounds, default and the sentence that documents it."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from apt_jobs.jobs.lora_options import LoraOptions
from apt_jobs.jobs.parameter_options import ParameterGroup, ParameterPattern
from apt_jobs.jobs.strict_model import Strict

SamplePrompt = Annotated[str, StringConstraints(min_length=1, max_length=2_000)]


class TrainingOptions(Strict):
    """How to train. One optimizer step sees `batch_size * gradient_accumulation_steps * num_ranks` sequences."""

    objective: Literal["next_token", "dpo"] = Field(
        "next_token",
        description="next_token: the cross entropy of documents, or of the answers of conversations and completions; "
        "dpo: prefer the `chosen` answer to the `rejected` one (Direct Preference Optimization), against base_model.",
    )
    dpo_beta: float = Field(0.1, gt=0.0, le=100.0, description="How close `dpo` keeps the model to base_model.")
    epochs: int = Field(1, ge=1, le=100_000, description="Passes over the training split.")
    max_steps: int | None = Field(None, ge=1, le=100_000_000, description="Stop after so many optimizer steps.")
    batch_size: int = Field(8, ge=1, le=4_096, description="Sequences per rank and micro step.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4_096, description="Micro steps per optimizer step.")
    optimizer: Literal["adamw", "adafactor", "lion", "muon", "adamw_8bit"] = Field(
        "adamw",
        description="muon: the matrices of blocks by Muon, all else by AdamW; adamw_8bit needs a GPU and bitsandbytes.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0.0,
        le=10.0,
        description="Peak of the schedule; null: 1e-3 from nothing, 2e-5 from a base model, 2e-4 of its adapter, a "
        "tenth of these for lion. Of adafactor it is relative to the size of each weight.",
    )
    min_learning_rate_ratio: float = Field(
        0.1, ge=0.0, le=1.0, description="End of the schedule, relative to the peak."
    )
    warmup_steps: int = Field(20, ge=0, le=10_000_000, description="Optimizer steps of linear warm-up.")
    warmup_ratio: float | None = Field(
        None, ge=0.0, lt=1.0, description="Warm up for this share of all steps; null: for `warmup_steps`."
    )
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = Field(
        "cosine",
        description="Of the learning rate after the warm-up. wsd: constant, then linear over the last `decay_ratio`; "
        "inverse_sqrt: with the root of warm-up steps over steps.",
    )
    decay_ratio: float = Field(0.2, gt=0.0, le=1.0, description="Share of all steps in which `wsd` decays.")
    weight_decay: float = Field(0.1, ge=0.0, le=10.0, description="Decoupled decay, on matrices only.")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="First momentum of AdamW and Lion.")
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="Second momentum of AdamW and Lion.")
    freeze: list[ParameterPattern] = Field(
        default_factory=list, max_length=100, description="Train no parameter whose name is like one of these patterns."
    )
    parameter_groups: list[ParameterGroup] = Field(
        default_factory=list, max_length=100, description="Other rates for some parameters; the first that fits counts."
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=1.0, description="Share of each target that goes to all tokens alike; not in validations."
    )
    z_loss: float = Field(
        0.0, ge=0.0, le=1.0, description="Weight of the squared log of the softmax's denominator; 1e-4 is usual."
    )
    grad_clip_norm: float | None = Field(1.0, gt=0.0, description="Clip the global norm to this; null: never.")
    validation_fraction: float = Field(0.05, ge=0.0, le=0.5, description="Share of the data held out.")
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="End after so many validations in a row without a better loss; null: no.",
    )
    load_best_model_at_end: bool = Field(
        False,
        description="When all steps are done, let the job's id and result name the checkpoint with the lowest loss in "
        "validation, not the last one. Either way it is kept, and is `job_...@best`.",
    )
    validate_every_steps: int = Field(50, ge=1, description="Optimizer steps between two validations.")
    max_validation_batches: int | None = Field(
        None, ge=1, description="Validate on at most so many batches of each rank; null: on the whole split."
    )
    checkpoint_every_steps: int = Field(100, ge=1, description="Optimizer steps between two checkpoints.")
    keep_checkpoints: int = Field(3, ge=1, le=1_000, description="Newest checkpoints kept, besides the best one.")
    keep_every_steps: int | None = Field(None, ge=1, description="Also keep each checkpoint at a multiple of this.")
    sample_prompts: list[SamplePrompt] = Field(
        default_factory=list,
        max_length=8,
        description="Continue these texts at each checkpoint, and show what comes of it; of chats they are questions.",
    )
    sample_tokens: int = Field(48, ge=1, le=256, description="Most new tokens of each sample; each is a forward pass.")
    sample_temperature: float = Field(
        0.0, ge=0.0, le=10.0, description="Of samples; 0: always the likeliest token. Others are drawn by `seed`."
    )
    seed: int = Field(1, ge=0, le=2**63 - 1, description="Seed of weights, data order and dropout.")
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16-true"] = Field(
        "auto",
        description="bf16, fp16: autocast, of weights in float32; auto: bf16 where the GPU has it, else fp16, fp32 on "
        "CPU. bf16-true: weights, gradients and optimizer in bfloat16, a third of the memory; small updates are lost.",
    )
    ema_decay: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Average the weights exponentially with this decay, 0.999 say: the average is validated, and is "
        "the model of each checkpoint. null: no.",
    )
    activation_checkpointing: bool = Field(
        False, description="Keep no activations within a block, but compute them again in the backward pass."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile each transformer block and the loss with torch.compile. auto: on GPUs. What cannot be "
        "compiled is trained without, and the log says so.",
    )
    deterministic: bool = Field(
        True,
        description="On GPUs take only operations that give the same bits each time, so that a resumed training equals "
        "one without a break. false: faster attention, and models that need an operation without such a form.",
    )
    sharding: Literal["ddp", "fsdp2"] = Field("ddp", description="fsdp2 shards models that outgrow one GPU.")
    lora: LoraOptions | None = Field(
        None, description="Train an adapter of `base_model` instead of all its weights; null: all of them."
    )

    @model_validator(mode="after")
    def _sharded_optimizer(self) -> Self:
        if self.sharding == "fsdp2" and self.optimizer in ("adafactor", "adamw_8bit"):
            raise ValueError(f"optimizer={self.optimizer} keeps no state that fsdp2 can shard; use adamw, lion or muon")
        return self

    @model_validator(mode="after")
    def _quantized_whole(self) -> Self:
        if self.sharding == "fsdp2" and self.lora is not None and self.lora.quantization is not None:
            raise ValueError("sharding='fsdp2' cannot shard weights of 4 bits; leave lora.quantization or sharding out")
        return self

    @model_validator(mode="after")
    def _average_is_exact(self) -> Self:
        if self.ema_decay is not None and self.precision == "bf16-true":
            raise ValueError("ema_decay averages weights in float32, and precision 'bf16-true' has none; use 'bf16'")
        return self

    @model_validator(mode="after")
    def _terms_of_cross_entropy(self) -> Self:
        if self.objective == "dpo" and (self.label_smoothing or self.z_loss):
            raise ValueError("label_smoothing and z_loss belong to the objective 'next_token': leave them out")
        return self

    def with_learning_rate(self, *, has_base_model: bool) -> Self:
        """Return them with the rate that a job trains with; what was given stays."""
        if self.learning_rate is not None:
            return self
        return self.model_copy(update={"learning_rate": _usual_learning_rate(self, has_base_model=has_base_model)})

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or what suits a training from nothing."""
        return self.learning_rate or _usual_learning_rate(self, has_base_model=False)


def _usual_learning_rate(options: TrainingOptions, *, has_base_model: bool) -> float:
    """Return the rate of who names none: that of others' defaults (Trainer 5e-5 and TRL 2e-5, of peft's adapters 2e-4).

    Lion wants a third to a tenth of AdamW's (Chen et al. 2023, section 5).
    """
    rate = 2e-4 if options.lora is not None else 2e-5 if has_base_model else 1e-3
    return rate / 10.0 if options.optimizer == "lion" else rate
