"""What an attempt ran with: enough to know a year later what it was, and to run it again."""

from pydantic import BaseModel, ConfigDict, Field

MAX_PACKAGES = 5_000


class PythonFacts(BaseModel):
    """A Python and its packages, as a file of the attempt's folder says what `set_up` found."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    python: str = Field(description="Its version, as `3.12.3`.")
    packages: list[str] = Field(max_length=MAX_PACKAGES, description="As `torch==2.10.0`, by name.")
    environment: str | None = Field(None, description="Name or hash of the environment; null: that of the service.")


class AttemptFacts(PythonFacts):
    """What an attempt ran with."""

    host: str
    system: str = Field(description="Kernel and machine, as `Linux-6.1-x86_64`.")
    gpus: list[str] = Field(description="Names of those that it was given.")
    gpu_driver: str | None = Field(None, description="Version of NVIDIA's kernel driver.")
    dataset_sha256: str | None = Field(None, description="Content of the data set; null: built in.")
    validation_dataset_sha256: str | None = None
    code: str | None = Field(None, description="SHA-256 of the packed folder, or the commit; null: the worker's.")
