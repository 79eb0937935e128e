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
    ValidationInfo,
    field_validator,
    model_validator,
)

from apt_jobs.jobs.code_source import Code
from apt_jobs.jobs.data_options import DataOptions
from apt_jobs.jobs.environment import Argument, VariableName
from apt_jobs.jobs.mixture import MAX_EVALUATED, MAX_MIXED, WeightedDataset
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.monitor_options import MonitorOptions
from apt_jobs.jobs.parent_results import FIELDS, RESULTS, references_in
from apt_jobs.jobs.printable import require_printable
from apt_jobs.jobs.python_environment import PythonEnvironment
from apt_jobs.jobs.resources import Resources
from apt_jobs.jobs.sampling_options import MAX_SEQUENCES, SamplingOptions
from apt_jobs.jobs.secrets import MAX_SECRETS_OF_JOB
from apt_jobs.jobs.strict_model import Strict
from apt_jobs.jobs.training_options import TrainingOptions

BUILTIN_DATASET = "pydoc-topics"  # English text shipped with CPython (pydoc_data.topics), 0.7 MB
BUILTIN_ENTRY_POINT = "language-model"
CODE_ENTRY_POINT = "code"  # of a job that brings its own; no operator registers it
MAX_TEXT_CHARS = 32_768

_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_MODEL_NAME = f"{_NAME}(@(best|latest|[0-9]{{1,18}}))?"
_PARENT_RESULT = r"\{\{ ?job(_[0-9a-z]{20})?\.(best|last)_checkpoint ?\}\}"  # see parent_results.py
Name = Annotated[str, StringConstraints(pattern=rf"^{_NAME}$")]
ModelName = Annotated[str, StringConstraints(pattern=rf"^{_MODEL_NAME}$")]
NameOrResult = Annotated[str, StringConstraints(pattern=rf"^({_NAME}|{_PARENT_RESULT})$")]
ModelNameOrResult = Annotated[str, StringConstraints(pattern=rf"^({_MODEL_NAME}|{_PARENT_RESULT})$")]
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


class After(Strict):
    """A job that has to end first."""

    job: Annotated[str, StringConstraints(pattern=r"^job_[0-9a-z]{20}$")] = Field(description="Its id.")
    on: Literal["success", "end"] = Field(
        "success", description="success: this job is cancelled if that one does not succeed; end: any end will do."
    )


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
    after: list[After] = Field(
        default_factory=list,
        max_length=100,
        description="Jobs to wait for. Fields may name their results, as `{{job.best_checkpoint}}`.",
    )

    @model_validator(mode="after")
    def _comes_after_each_once(self) -> Self:
        named = [one.job for one in self.after]
        if len(named) > len(set(named)):
            raise ValueError(f"after names a job twice: {max(named, key=named.count)}")
        return self

    @model_validator(mode="after")
    def _names_results_of_its_parents(self) -> Self:
        named = [one.job for one in self.after]
        for field, parent, result in references_in({name: getattr(self, name, None) for name in FIELDS}):
            if not named and field in ("argv", "arguments", "env"):
                continue  # the script's own braces
            if result not in RESULTS:
                raise ValueError(f"{field} names {result!r} of a job; expected one of {', '.join(RESULTS)}")
            if parent == "job" and len(named) != 1:
                raise ValueError(f"{field} names a result of `job`, but after has {len(named)} jobs: write its id")
            if parent != "job" and parent not in named:
                raise ValueError(f"{field} names a result of {parent}, which is not in after")
        return self


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
    datasets: Annotated[list[WeightedDataset], Field(min_length=1, max_length=MAX_MIXED)] | None = Field(
        None, description="Train on a mixture of data sets, in place of `dataset`; null: on that one."
    )
    validation_datasets: dict[Name, Name] = Field(
        default_factory=dict,
        max_length=MAX_EVALUATED,
        description="Also evaluate on these data sets at each validation: {name: data set}; the losses are the metrics "
        "`eval/<name>/loss`.",
    )
    base_model: NameOrResult | None = Field(
        None, description="Start from a local model or a checkpoint id (`GET /api/models`)."
    )
    num_ranks: int = Field(1, ge=1, le=512, description="Processes, one per GPU where there are GPUs.")
    num_nodes: int = Field(1, ge=1, le=64, description="Machines to spread the ranks over, equally many on each.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if the worker has them.")
    resources: Resources = Field(default_factory=Resources)
    preemptible: bool | None = Field(
        None,
        description="Whether it saves and yields its room to a waiting job of higher priority, and goes on later. "
        "null: the built-in trainer does; a user script, which may save nothing, does not.",
    )
    grace_period_s: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="Longest time to save when it is preempted, in seconds; null: `APT_JOBS_DRAIN_TIMEOUT_S`.",
    )
    model: Annotated[APTConfig, BeforeValidator(_default_model, json_schema_input_type=APTConfig | None)] = Field(
        default_factory=APTConfig, description="null: the default, as answers show it for a script."
    )
    training: TrainingOptions = Field(default_factory=TrainingOptions, validate_default=True)
    data: DataOptions = Field(default_factory=DataOptions)
    monitor: MonitorOptions = Field(default_factory=MonitorOptions)

    @field_validator("training", mode="after")
    @classmethod
    def _rate_is_known(cls, training: TrainingOptions, info: ValidationInfo) -> TrainingOptions:
        """Keep with the job what it trains with, whatever later versions take where nothing is said."""
        return training.with_learning_rate(has_base_model=info.data.get("base_model") is not None)

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

    @model_validator(mode="before")
    @classmethod
    def _mixture_begins_with_a_dataset(cls, values: Any) -> Any:
        """Let `dataset` be the first of `datasets`, so that whoever reads it alone finds one that is trained on."""
        mixed = values.get("datasets") if isinstance(values, dict) else None
        if not mixed or "dataset" in values or not isinstance(mixed, list):
            return values
        first = mixed[0]
        return {**values, "dataset": first.get("name") if isinstance(first, dict) else getattr(first, "name", first)}

    @model_validator(mode="after")
    def _mixture_is_one(self) -> Self:
        names = [one.name for one in self.datasets or ()]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"datasets names {repeated!r} more than once: give it one weight")
        if names and self.dataset != names[0]:
            raise ValueError(f"dataset={self.dataset!r} and datasets are given; name it among `datasets` alone")
        if names and self.entry_point != BUILTIN_ENTRY_POINT:
            raise ValueError("datasets is of the built-in trainer; a script finds data sets by current_run().dataset()")
        return self

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
    def _validates_if_it_must(self) -> Self:
        options = self.training
        if options.validation_fraction == 0.0 and self.validation_dataset is None:
            asked = {
                "load_best_model_at_end": options.load_best_model_at_end,
                "early_stopping_patience": options.early_stopping_patience is not None,
            }
            if names := [name for name, is_given in asked.items() if is_given]:
                raise ValueError(
                    f"training.{names[0]} compares validation losses, and there is no validation: raise "
                    "training.validation_fraction above 0 or name a validation_dataset"
                )
        return self

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> Self:
        if self.training.lora is not None and self.base_model is None:
            raise ValueError("training.lora trains an adapter of a base model: name one in base_model")
        return self

    @model_validator(mode="after")
    def _resources_suffice(self) -> Self:
        self.resources.require_suited(self.device, self.ranks_per_node, self.num_nodes)
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def is_preemptible(self) -> bool:
        """Whether it yields to jobs of higher priority."""
        return self.entry_point == BUILTIN_ENTRY_POINT if self.preemptible is None else self.preemptible

    @property
    def brings_code(self) -> bool:
        """Whether it runs what the operator did not put there: packages run code, too, as they are installed."""
        return self.code is not None or (self.environment is not None and self.environment.is_built)

    @property
    def mixture(self) -> list[WeightedDataset]:
        """What it trains on, with weights: of one data set that alone."""
        return self.datasets or [WeightedDataset(name=self.dataset)]

    @property
    def dataset_fields(self) -> dict[str, str]:
        """Every data set that the job names, by its place in the request."""
        fields = {"dataset": self.dataset}
        if self.datasets is not None:
            fields = {f"datasets/{number}/name": one.name for number, one in enumerate(self.datasets)}
        if self.validation_dataset is not None:
            fields["validation_dataset"] = self.validation_dataset
        return fields | {f"validation_datasets/{name}": dataset for name, dataset in self.validation_datasets.items()}


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
    model: ModelNameOrResult | None = Field(
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
        return self

    @model_validator(mode="after")
    def _only_embeds(self) -> Self:
        if self.embed is None:
            return self
        if len(self.texts) != 1 or self.messages is not None:
            raise ValueError("a job with embed has one text, which it replaces, and no messages")
        if changed := self.changed_options():
            raise ValueError(
                f"a job with embed continues no text: leave out {', '.join(changed)}, which would change nothing"
            )
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
