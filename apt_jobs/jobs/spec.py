"""What a job is: the validated request, stored with the row and handed to the ranks unchanged.

One model validates the REST body, documents it (OpenAPI) and is read by the worker. All sizes are bounded here.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    TypeAdapter,
    model_validator,
)

from apt_jobs.jobs.code_source import Code
from apt_jobs.jobs.data_options import DataOptions
from apt_jobs.jobs.environment import Argument, VariableName
from apt_jobs.jobs.lora_options import LoraOptions
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.monitor_options import MonitorOptions
from apt_jobs.jobs.parameter_options import ParameterGroup, ParameterPattern
from apt_jobs.jobs.printable import require_printable
from apt_jobs.jobs.python_environment import PythonEnvironment
from apt_jobs.jobs.resources import Resources
from apt_jobs.jobs.sampling_options import MAX_SEQUENCES, SamplingOptions
from apt_jobs.jobs.secrets import MAX_SECRETS_OF_JOB
from apt_jobs.jobs.strict_model import Strict

BUILTIN_DATASET = "pydoc-topics"  # English text shipped with CPython (pydoc_data.topics), 0.7 MB
BUILTIN_ENTRY_POINT = "language-model"
CODE_ENTRY_POINT = "code"  # of a job that brings its own; no operator registers it
MAX_TEXT_CHARS = 32_768

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}(@(best|latest|[0-9]{1,18}))?$")]
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


def _default_model(value: object) -> object:
    """Take the null that answers show for a script that was given no model."""
    return APTConfig() if value is None else value


def _usual_learning_rate(options: "TrainingOptions", *, has_base_model: bool) -> float:
    """Return the rate of who names none: that of others' defaults (Trainer 5e-5 and TRL 2e-5, of peft's adapters 2e-4).

    Lion wants a third to a tenth of AdamW's (Chen et al. 2023, section 5).
    """
    rate = 2e-4 if options.lora is not None else 2e-5 if has_base_model else 1e-3
    return rate / 10.0 if options.optimizer == "lion" else rate


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
    lora: LoraOptions | None = Field(
        None, description="Train an adapter of `base_model` instead of all its weights; null: all of them."
    )

    @model_validator(mode="after")
    def _sharded_optimizer(self) -> Self:
        if self.sharding == "fsdp2" and self.optimizer in ("adafactor", "adamw_8bit"):
            raise ValueError(f"optimizer={self.optimizer} keeps no state that fsdp2 can shard; use adamw, lion or muon")
        return self

    @model_validator(mode="after")
    def _terms_of_cross_entropy(self) -> Self:
        if self.objective == "dpo" and (self.label_smoothing or self.z_loss):
            raise ValueError("label_smoothing and z_loss belong to the objective 'next_token': leave them out")
        return self

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or what suits a training from nothing."""
        return self.learning_rate or _usual_learning_rate(self, has_base_model=False)


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
        description="Environment variables of the ranks. All who may read the job see them: see `secrets`.",
    )
    secrets: list[VariableName] = Field(
        default_factory=list,
        max_length=MAX_SECRETS_OF_JOB,
        description="Secrets of `GET /api/secrets` that a user script gets as environment variables of these names.",
    )
    environment: PythonEnvironment | None = Field(
        None, description="Python and packages of a user script; null: those of the service."
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
    resources: Resources = Field(default_factory=Resources)
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
        if self.code is not None and self.code.git is not None and self.num_nodes > 1:
            raise ValueError("a commit is fetched on one machine; for several upload a packed folder (apt-jobs run)")
        if self.launcher == "none" and self.entry_point == BUILTIN_ENTRY_POINT:
            raise ValueError("launcher='none' is for user scripts: the built-in trainer needs torchrun")
        if self.launcher == "none" and self.num_nodes > 1:
            raise ValueError(f"launcher='none' starts one process on one node; got num_nodes={self.num_nodes}")
        return self

    @model_validator(mode="after")
    def _environment_is_of_a_script(self) -> Self:
        if self.environment is None:
            return self
        if self.entry_point == BUILTIN_ENTRY_POINT:
            raise ValueError("environment is for user scripts: the built-in trainer runs in that of the service")
        if self.environment.lock is not None and self.code is None:
            raise ValueError("environment.lock names a file of the job's code, and the job has no code")
        if self.environment.is_built and self.num_nodes > 1:
            raise ValueError("an environment is built on one machine; for several have the operator register it")
        return self

    @model_validator(mode="after")
    def _secrets_are_of_a_script(self) -> Self:
        if self.secrets and self.entry_point == BUILTIN_ENTRY_POINT:
            raise ValueError("secrets are for user scripts: the built-in trainer needs none")
        if twice := sorted({name for name in self.secrets if name in self.env or self.secrets.count(name) > 1}):
            raise ValueError(f"{twice[0]} is given twice, in secrets and env or twice in secrets; name it once")
        return self

    @model_validator(mode="after")
    def _dpo_has_a_reference(self) -> Self:
        if self.training.objective == "dpo" and self.base_model is None:
            raise ValueError("training.objective 'dpo' needs base_model: the model that answers are compared with")
        if self.training.objective == "dpo" and self.data.train_on == "everything":
            raise ValueError("training.objective 'dpo' compares answers only: leave data.train_on out")
        return self

    @model_validator(mode="after")
    def _rate_is_known(self) -> Self:
        if self.training.learning_rate is None:
            rate = _usual_learning_rate(self.training, has_base_model=self.base_model is not None)
            # The job keeps what it trains with, whatever later versions take where nothing is said.
            self.__dict__["training"] = self.training.model_copy(update={"learning_rate": rate})
        return self

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> Self:
        if self.training.lora is not None and self.base_model is None:
            raise ValueError("training.lora trains an adapter of a base model: name one in base_model")
        return self

    @model_validator(mode="after")
    def _resources_suffice(self) -> Self:
        self.resources.require_suited(self.device, self.ranks_per_node)
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def brings_code(self) -> bool:
        """Whether it runs what the operator did not put there: packages run code, too, as they are installed."""
        return self.code is not None or (self.environment is not None and self.environment.is_built)


EmbedInput = (
    Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]
    | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_TEXT_CHARS)]
)


class ChatMessage(Strict):
    """One message of a chat."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=40)]
    content: Text


class GenerateSpec(JobSpec, SamplingOptions):
    """A generation job: one or many texts continued by one model."""

    kind: Literal["generate"]
    texts: list[Text] = Field(min_length=1, max_length=MAX_SEQUENCES, description="Prompts, in any language.")
    model: ModelName | None = Field(
        None, description="Id or alias of `GET /api/models`, or `job_...@best`; default: the newest checkpoint."
    )
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, max_length=1_000, description="A chat, written by the model's template in place of `texts`."
    )

    embed: list[EmbedInput] | None = Field(
        None,
        min_length=1,
        max_length=2_048,
        description="Texts or token ids in place of `texts`, which are not continued: the result has the mean of the "
        "last hidden states of each, as base64 of float32.",
    )

    @model_validator(mode="after")
    def _one_chat(self) -> Self:
        if self.messages is not None and len(self.texts) != 1:
            raise ValueError(f"a job with messages has one text, which they replace; got {len(self.texts)}")
        if self.embed is not None and (len(self.texts) != 1 or self.messages is not None or self.stream):
            raise ValueError("a job with embed has one text, which it replaces, no messages and no stream")
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
