"""The body of `POST /v1/fine_tuning/jobs`, and the training job that it asks for."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from apt_jobs.artifacts.conversations import RowKind
from apt_jobs.jobs.data_options import DataOptions
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.printable import require_printable
from apt_jobs.jobs.spec import ModelName, TrainSpec
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.web.openai.endpoint import Metadata

AUTO_EPOCHS = 3
AUTO_BATCH = 8
LEARNING_RATE = 5e-5  # times `learning_rate_multiplier`
MAX_SEQUENCE = 1_024  # tokens
MIN_SEQUENCE = 32
BYTES_PER_TOKEN = 4
MIN_STEPS_PER_EPOCH = 4  # that a small file is cut for

Auto = Literal["auto"]


class Hyperparameters(BaseModel):
    """`auto`: as the size of the file asks for."""

    model_config = ConfigDict(extra="forbid")
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1_000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4_096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0.0, le=1_000.0)] = "auto"


class Supervised(BaseModel):
    model_config = ConfigDict(extra="forbid")
    hyperparameters: Hyperparameters | None = None


class SupervisedMethod(BaseModel):
    """How to train: `supervised` is the one that there is."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["supervised"]
    supervised: Supervised | None = None


class FineTuningRequest(BaseModel):
    """`POST /v1/fine_tuning/jobs`."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName = Field(description="Id of `/v1/models`.")
    training_file: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    validation_file: None = Field(None, description="A share of `training_file` is held out.")
    hyperparameters: Hyperparameters | None = None
    method: SupervisedMethod | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(require_printable)] | None = (
        Field(None, description="Part of the job's name.")
    )
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _hyperparameters_once(self) -> Self:
        if self.hyperparameters is not None and self.method is not None and self.method.supervised is not None:
            raise ValueError("hyperparameters are in `method`, too; send them in one of the two places")
        return self

    def job(self, fine_tuning_id: str, base_model: str, dataset: str, size_bytes: int, kind: RowKind) -> TrainSpec:
        """Return the job, from a model's id and a file of this size that holds rows of this kind."""
        asked = self.hyperparameters
        if asked is None and self.method is not None and self.method.supervised is not None:
            asked = self.method.supervised.hyperparameters
        asked = asked or Hyperparameters()
        batch_size, sequence = _shape(size_bytes, asked.batch_size)
        if kind is not RowKind.TEXT:  # a sequence is as long as the longest example
            sequence = MAX_SEQUENCE
        multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
        options: dict[str, Any] = {} if self.seed is None else {"seed": self.seed}
        return TrainSpec(
            kind="train",
            name=f"fine-tuning {self.suffix or fine_tuning_id}",
            labels={"fine_tuning": fine_tuning_id},
            dataset=dataset,
            base_model=base_model,
            model=APTConfig(max_seq_len=sequence),
            data=DataOptions(packing=False, longer_than_context="truncate"),  # a batch counts examples
            training=TrainingOptions(
                epochs=AUTO_EPOCHS if asked.n_epochs == "auto" else asked.n_epochs,
                batch_size=batch_size,
                learning_rate=min(LEARNING_RATE * multiplier, 10.0),
                warmup_ratio=0.05,
                **options,
            ),
        )


def hyperparameters_of(spec: TrainSpec) -> dict[str, Any]:
    """Return what a job trains with, as the dialect names it."""
    return {
        "n_epochs": spec.training.epochs,
        "batch_size": spec.training.batch_size,
        "learning_rate_multiplier": spec.training.peak_learning_rate / LEARNING_RATE,
    }


def _shape(size_bytes: int, asked_batch: int | Auto) -> tuple[int, int]:
    """Return batch and sequence length, smaller for small files, so that an epoch has a few steps."""
    tokens = size_bytes // BYTES_PER_TOKEN
    batch, sequence = AUTO_BATCH if asked_batch == "auto" else asked_batch, MAX_SEQUENCE
    while batch * sequence * MIN_STEPS_PER_EPOCH > tokens and sequence > MIN_SEQUENCE:
        if asked_batch == "auto" and batch > 1 and sequence <= MAX_SEQUENCE // 4:
            batch //= 2
        else:
            sequence //= 2
    while asked_batch == "auto" and batch > 1 and batch * sequence * MIN_STEPS_PER_EPOCH > tokens:
        batch //= 2
    return batch, sequence
