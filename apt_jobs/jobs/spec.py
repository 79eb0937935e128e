"""What a job is: the validated request, stored with the row and handed to the ranks unchanged.

One model validates the REST body, documents it (OpenAPI) and is read by the worker. All sizes are bounded here.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    model_validator,
)

from apt_jobs.jobs.code import Sha256
from apt_jobs.jobs.data_options import DataOptions
from apt_jobs.jobs.environment import Argument, VariableName
from apt_jobs.jobs.printable import require_printable
from apt_jobs.jobs.strict_model import Strict

BUILTIN_DATASET = "pydoc-topics"  # English text shipped with CPython (pydoc_data.topics), 0.7 MB
BUILTIN_ENTRY_POINT = "language-model"
CODE_ENTRY_POINT = "code"  # of a job that brings its own; no operator registers it
MAX_TEXT_CHARS = 32_768
MAX_NEW_TOKENS = 4_096

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]
Title = Annotated[str, StringConstraints(max_length=200), AfterValidator(require_printable)]
LabelValue = Title


def _require_64_bits(value: object) -> object:
    """Refuse what would become a float, or break a reader, on its way to the ranks."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("the integer does not fit 64 bits (-2**63 to 2**63 - 1); send it as a string")
    return value


ArgumentValue = Annotated[
    bool | int | float | Annotated[str, StringConstraints(max_length=1_000)], BeforeValidator(_require_64_bits)
]


IncidentKind = Literal[
    "nan", "inf", "exploding", "vanishing", "spike", "vanished", "rank_outlier", "straggler", "desync", "update_spike"
]
PolicyAction = Literal["warn", "checkpoint", "pause", "rollback", "skip_batches", "cut_lr", "cancel"]


class APTConfig(Strict):
    """Size of the language model. Built as a Hugging Face `LlamaForCausalLM`.

    Args:
        **fields: The fields below, each with its default and bounds.

    Raises:
        ValidationError: a field is unknown or out of bounds, or the heads do not divide the width.

    Example:
        config = APTConfig(d_model=256, num_layers=6, num_attention_heads=8)
        print(config.num_parameters)
    """

    # REST documents it by its first line, not by what Python programs need.
    model_config = ConfigDict(json_schema_extra={"description": "Size of the language model, a `LlamaForCausalLM`."})

    d_model: int = Field(128, ge=8, le=16_384, description="Width of the residual stream.")
    num_layers: int = Field(4, ge=1, le=200, description="Number of transformer blocks.")
    num_attention_heads: int = Field(4, ge=1, le=256, description="Attention heads; must divide d_model.")
    num_key_value_heads: int | None = Field(None, ge=1, le=256, description="Grouped heads; default: as many as heads.")
    d_ff: int | None = Field(None, ge=8, le=131_072, description="Width of the MLP; default: 8/3 d_model.")
    vocab_size: int = Field(2_048, ge=260, le=262_144, description="Size of the byte-level BPE vocabulary.")
    max_seq_len: int = Field(128, ge=8, le=131_072, description="Longest sequence, in tokens.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout of the attention weights.")
    tie_embeddings: bool = Field(True, description="Share the input and output embedding.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_model % self.num_attention_heads or (self.d_model // self.num_attention_heads) % 2:
            raise ValueError(
                f"d_model={self.d_model} must be an even multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_parameters > 200_000_000_000:
            raise ValueError(f"the model would have {self.num_parameters:,} parameters; at most 200,000,000,000")
        return self

    @property
    def feed_forward_size(self) -> int:
        return self.d_ff or (self.d_model * 8 // 3 + 7) // 8 * 8

    @property
    def num_parameters(self) -> int:
        """Parameters of the Llama model that this configuration builds."""
        key_value_size = (
            self.d_model // self.num_attention_heads * (self.num_key_value_heads or self.num_attention_heads)
        )
        attention = 2 * self.d_model * self.d_model + 2 * self.d_model * key_value_size
        block = attention + 3 * self.d_model * self.feed_forward_size + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + embeddings + self.d_model


def _default_model(value: object) -> object:
    """Take the null that answers show for a script that was given no model."""
    return APTConfig() if value is None else value


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
    learning_rate: float = Field(1e-3, gt=0.0, le=10.0, description="Peak of the schedule.")
    min_learning_rate_ratio: float = Field(
        0.1, ge=0.0, le=1.0, description="End of the schedule, relative to the peak."
    )
    warmup_steps: int = Field(20, ge=0, le=10_000_000, description="Optimizer steps of linear warm-up.")
    warmup_ratio: float | None = Field(
        None, ge=0.0, lt=1.0, description="Warm up for this share of all steps; null: for `warmup_steps`."
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Of the learning rate after the warm-up. wsd: constant, then linear over the last `decay_ratio`.",
    )
    decay_ratio: float = Field(0.2, gt=0.0, le=1.0, description="Share of all steps in which `wsd` decays.")
    weight_decay: float = Field(0.1, ge=0.0, le=10.0, description="AdamW's decay, on matrices only.")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW's first momentum.")
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="AdamW's second momentum.")
    grad_clip_norm: float | None = Field(1.0, gt=0.0, description="Clip the global norm to this; null: never.")
    validation_fraction: float = Field(0.05, ge=0.0, le=0.5, description="Share of the data held out.")
    validate_every_steps: int = Field(50, ge=1, description="Optimizer steps between two validations.")
    max_validation_batches: int | None = Field(
        None, ge=1, description="Validate on at most so many batches of each rank; null: on the whole split."
    )
    checkpoint_every_steps: int = Field(100, ge=1, description="Optimizer steps between two checkpoints.")
    keep_checkpoints: int = Field(3, ge=1, le=1_000, description="Newest checkpoints kept, besides the best one.")
    keep_every_steps: int | None = Field(None, ge=1, description="Also keep each checkpoint at a multiple of this.")
    seed: int = Field(1, ge=0, le=2**63 - 1, description="Seed of weights, data order and dropout.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 autocast where the GPU has it, else fp16; fp32 on CPU."
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


class AnomalyPolicy(Strict):
    """What to do by itself when an incident of one of these kinds is open."""

    kinds: list[IncidentKind] = Field(min_length=1, max_length=16, description="Kinds of incident that it answers.")
    action: PolicyAction = Field(
        description="checkpoint: save; pause: save and wait for a user; rollback: go back to the checkpoint before the "
        "incident and skip the batches since; skip_batches: go on with later batches; cut_lr: multiply the learning "
        "rate by `factor`; cancel: end the job; warn: only say so."
    )
    layers: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        None, description="Only for layers like this pattern, as `model.layers.*`."
    )
    patience_steps: int = Field(1, ge=1, le=1_000_000, description="Steps on which the incident has to be seen.")
    max_times: int = Field(1, ge=1, le=1_000, description="At most so often in an attempt.")
    skip_steps: int = Field(50, ge=1, le=1_000_000, description="Further steps whose batches are skipped.")
    factor: float = Field(0.5, gt=0.0, lt=1.0, description="Of the learning rate, for `cut_lr`.")


class MonitorOptions(Strict):
    """The gradient monitor. Thresholds are norms of one layer's gradient."""

    vanishing_below: float = Field(1e-7, ge=0.0, description="A norm below this is vanishing.")
    exploding_above: float = Field(1e3, gt=0.0, description="A norm above this is exploding.")
    every_steps: int = Field(1, ge=1, le=1_000_000, description="Optimizer steps between two records.")
    rank_norms_every_steps: int = Field(
        10, ge=1, le=1_000_000, description="Steps between two stored records of every rank's layers."
    )
    window_steps: int = Field(128, ge=8, le=4_096, description="Records of which it is known what is usual.")
    arm_after_steps: int = Field(32, ge=4, le=4_096, description="Records of a layer before it is judged by them.")
    spike_ratio: float = Field(5.0, gt=1.0, description="A spike is at least so many times its forecast.")
    spike_mads: float = Field(
        8.0, gt=0.0, description="And so many usual errors of forecasts above it, in logs, more than its block is."
    )
    block_spike_mads: float = Field(10.0, gt=0.0, description="Or so many, whatever the rest of its block does.")
    vanished_ratio: float = Field(100.0, gt=1.0, description="Vanished: less than the median divided by this.")
    vanished_steps: int = Field(20, ge=1, description="For so many records in a row.")
    rank_ratio: float = Field(8.0, gt=1.0, description="A rank is an outlier at so many times the other ranks.")
    rank_mads: float = Field(10.0, gt=0.0, description="And so many deviations from where it usually is.")
    straggler_ratio: float = Field(
        1.3, gt=1.0, description="A straggler computes so many times as long as others, and 5 ms longer."
    )
    straggler_steps: int = Field(50, ge=5, le=4_096, description="For nearly so many records in a row.")
    quiet_steps: int = Field(20, ge=1, description="Records without it after which an incident is over.")
    on_anomaly: list[AnomalyPolicy] = Field(
        default_factory=list, max_length=16, description="What the job does by itself about incidents."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.vanishing_below >= self.exploding_above:
            raise ValueError(
                f"vanishing_below={self.vanishing_below} must be less than exploding_above={self.exploding_above}"
            )
        if self.arm_after_steps > self.window_steps:
            raise ValueError(
                f"arm_after_steps={self.arm_after_steps} must not be more than window_steps={self.window_steps}"
            )
        return self


class JobSpec(Strict):
    """What all kinds of job share."""

    name: Title | None = Field(None, description="Shown in lists.")
    queue: Name | None = Field(None, description="Queue to wait in; default: the job's kind.")
    priority: int = Field(0, ge=-100, le=100, description="Higher runs first.")
    labels: dict[Name, LabelValue] = Field(default_factory=dict, max_length=32, description="Free key/value pairs.")
    max_attempts: int = Field(3, ge=1, le=100, description="Attempts before the job is given up.")
    time_limit_s: float | None = Field(
        None, gt=0, le=366 * 86_400, description="Longest time of one attempt, in seconds; then it saves and fails."
    )


class Code(Strict):
    """The code that a job brings: a packed folder, whose command `argv` is."""

    sha256: Sha256 = Field(description="Of the packed folder, uploaded by `PUT /api/code/{sha256}` (`apt-jobs run`).")


class TrainSpec(JobSpec):
    """A training job: `num_ranks` processes under torchrun, or one that does as it likes."""

    kind: Literal["train"]
    entry_point: Name = Field(BUILTIN_ENTRY_POINT, description="Registered on the worker; never a command line.")
    arguments: dict[Name, ArgumentValue] = Field(
        default_factory=dict, max_length=64, description="Arguments of a registered entry point."
    )
    argv: list[Argument] = Field(
        default_factory=list,
        max_length=256,
        description='Command line of a registered script, as `["--lr", "3e-4"]`; `arguments` follow it. With `code` '
        'the whole command, as `["python", "train.py"]`; no shell reads it.',
    )
    code: Code | None = Field(None, description="Code of the job itself, where the operator allows it.")
    launcher: Literal["torchrun", "none"] = Field(
        "torchrun",
        description="none: one process, which may start others; `num_ranks` is how many GPUs it sees.",
    )
    env: dict[VariableName, Argument] = Field(
        default_factory=dict,
        max_length=64,
        description="Environment variables of the ranks. All who may read the job see them: no secrets.",
    )
    dataset: Name = Field(BUILTIN_DATASET, description="A data set of `GET /api/datasets`.")
    validation_dataset: Name | None = Field(
        None, description="Validate on this data set; null: on `validation_fraction` of `dataset`, held out."
    )
    base_model: Name | None = Field(
        None, description="Start from a local model or a checkpoint id (`GET /api/models`)."
    )
    num_ranks: int = Field(1, ge=1, le=512, description="Processes, one per GPU where there are GPUs.")
    num_nodes: int = Field(1, ge=1, le=64, description="Machines to spread the ranks over, equally many on each.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if the worker has them.")
    model: Annotated[APTConfig, BeforeValidator(_default_model, json_schema_input_type=APTConfig | None)] = Field(
        default_factory=APTConfig, description="null: the default, as answers show it for a script."
    )
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    data: DataOptions = Field(default_factory=DataOptions)
    monitor: MonitorOptions = Field(default_factory=MonitorOptions)

    @model_validator(mode="after")
    def _nodes_divide(self) -> Self:
        if self.num_ranks % self.num_nodes:
            raise ValueError(f"num_nodes={self.num_nodes} must divide num_ranks={self.num_ranks}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _code_is_its_own_entry_point(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("code") is not None and "entry_point" not in values:
            return {**values, "entry_point": CODE_ENTRY_POINT}
        return values

    @model_validator(mode="after")
    def _code_has_a_command(self) -> Self:
        if self.code is None and self.entry_point == CODE_ENTRY_POINT:
            raise ValueError("entry_point='code' needs `code`, which `apt-jobs run` uploads")
        if self.code is not None and self.entry_point != CODE_ENTRY_POINT:
            raise ValueError(f"a job with code has no entry_point; got {self.entry_point!r}: leave it out")
        if self.code is not None and (not self.argv or not self.argv[0] or self.arguments):
            raise ValueError('a job with code has its whole command in argv, as ["python", "train.py"], no arguments')
        if self.launcher == "none" and self.entry_point == BUILTIN_ENTRY_POINT:
            raise ValueError("launcher='none' is for user scripts: the built-in trainer needs torchrun")
        if self.launcher == "none" and self.num_nodes > 1:
            raise ValueError(f"launcher='none' starts one process on one node; got num_nodes={self.num_nodes}")
        return self

    @model_validator(mode="after")
    def _dpo_has_a_reference(self) -> Self:
        if self.training.objective == "dpo" and self.base_model is None:
            raise ValueError("training.objective 'dpo' needs base_model: the model that answers are compared with")
        if self.training.objective == "dpo" and self.data.train_on == "everything":
            raise ValueError("training.objective 'dpo' compares answers only: leave data.train_on out")
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes


class SamplingOptions(Strict):
    """How to continue a text. What is left out is as the model's generation_config.json says, else greedy."""

    max_length: int = Field(100, ge=1, le=MAX_NEW_TOKENS, description="Most tokens to add to each text.")
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="The same by its usual name; goes before `max_length`."
    )
    temperature: float | None = Field(None, ge=0.0, le=10.0, description="0: greedy, the likeliest token each time.")
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="Sample from so many likeliest tokens; 0: all.")
    top_p: float | None = Field(
        None, gt=0.0, le=1.0, description="Nucleus sampling: the smallest set of tokens with this mass."
    )
    min_p: float | None = Field(
        None, ge=0.0, le=1.0, description="Drop tokens less likely than this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10.0, description="Above 1: tokens of the text and of what was added are less likely."
    )
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="Off the logits of tokens that were added.")
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="The same for each time they were added.")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="Same request, same seed, same text.")
    stop: list[Annotated[str, StringConstraints(min_length=1, max_length=100)]] = Field(
        default_factory=list, max_length=8, description="Generation ends before the first of these."
    )
    truncate: bool = Field(
        False, description="Cut the beginning off a text that is longer than the model's context; else it is refused."
    )

    stream: bool = Field(False, description="Send what is added as it comes; it is stored in the end in any case.")

    @property
    def max_new_tokens(self) -> int:
        return self.max_length if self.max_tokens is None else self.max_tokens


class ChatMessage(Strict):
    """One message of a chat."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=40)]
    content: Text


class GenerateSpec(JobSpec, SamplingOptions):
    """A generation job: one or many texts continued by one model."""

    kind: Literal["generate"]
    texts: list[Text] = Field(min_length=1, max_length=64, description="Prompts, in any language.")
    model: Name | None = Field(None, description="Id of `GET /api/models`; default: the newest checkpoint.")
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, max_length=1_000, description="A chat, written by the model's template in place of `texts`."
    )

    @model_validator(mode="after")
    def _one_chat(self) -> Self:
        if self.messages is not None and len(self.texts) != 1:
            raise ValueError(f"a job with messages has one text, which they replace; got {len(self.texts)}")
        return self


AnyJobSpec = Annotated[TrainSpec | GenerateSpec, Field(discriminator="kind")]
_SPEC: TypeAdapter[TrainSpec | GenerateSpec] = TypeAdapter(AnyJobSpec)


def parse_spec(stored: Mapping[str, Any]) -> TrainSpec | GenerateSpec:
    """Return the spec that a row of the database holds."""
    return _SPEC.validate_python(stored, strict=False)


def queue_of(spec: TrainSpec | GenerateSpec) -> str:
    """Return the queue that the job waits in."""
    return spec.queue or spec.kind


NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")  # as `Name`
JOB_ID_PATTERN = re.compile(r"^job_[0-9a-z]{20}$")
CHECKPOINT_ID_PATTERN = re.compile(r"^ckpt_[0-9a-z]{20}$")
