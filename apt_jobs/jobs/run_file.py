"""The run file: what the supervisor passes to the ranks of one attempt. JSON in its folder, read once by each rank.

User scripts read the same file with `jobs/handover.py`.

The ranks know nothing else of the service: no database, no broker, no network but their own.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat
from apt_jobs.jobs.spec import TrainSpec

SCRIPT_SUFFIX = ".py"  # an entry point that ends so is a file to run, not a function to import


class NamedSource(BaseModel):
    """A data set of an attempt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    file: Path | None  # None: the built-in data set
    format: DatasetFormat = DatasetFormat.TEXT
    column: str = DEFAULT_COLUMN  # of JSONL and Parquet
    sha256: str | None = None  # of the file; None: rank 0 computes it


class EnvironmentPlan(BaseModel):
    """Where the Python of a user script is, or how it is built from what the spec lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    registered_dir: Path | None = None  # None: it is built
    environments_dir: Path  # where built ones are
    python: str  # version of one to build
    timeout_s: float
    max_bytes: int  # of all built ones
    max_unused_s: float


class GitPlan(BaseModel):
    """How a commit is fetched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_dir: Path
    timeout_s: float
    max_bytes: int  # of one commit
    max_cache_bytes: int


class RunFile(BaseModel):
    """Everything that a rank needs. Paths are absolute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    attempt: int
    spec: TrainSpec
    entry_point: str | None = None  # registered: "module:function" or the path of a script; None: the built-in trainer
    command: list[str] | None = None  # of code that the job brings, or of a script without torchrun
    git: GitPlan | None = None  # of code that is a commit
    environment: EnvironmentPlan | None = None  # Python of a user script; None: that of the service
    dataset_file: Path | None = None  # None: the built-in data set
    dataset_format: DatasetFormat = DatasetFormat.TEXT
    dataset_column: str = DEFAULT_COLUMN  # of JSONL and Parquet
    dataset_sha256: str | None = None  # of the file; None: rank 0 computes it
    validation_source: NamedSource | None = None  # None: a share of the data set is held out
    mixed_sources: list[NamedSource] = []  # of a mixture: the data sets besides `dataset_source`
    evaluation_sources: dict[str, NamedSource] = {}  # `validation_datasets` of the job
    prepared_dir: Path | None = None  # tokens that jobs share; None: a folder of this attempt
    base_model_dir: Path | None = None  # weights to start from; None: random weights
    base_adapter_dirs: list[Path] = []  # adapters to add to them first, in this order
    resume_dir: Path | None = None  # checkpoint of an earlier attempt to continue; None: start at step 0
    resume_step: int = 0  # of that checkpoint
    datasets_dir: Path | None = None  # where all data sets are, for user scripts
    output_dir: Path | None = None  # a user script's own folder, the same for all attempts of the job
    rendezvous: str | None = None  # "host:port" where the nodes meet; None: there is one node
    node_names: list[str] = []  # of the workers that are the nodes 1, 2, ...
    threads_per_rank: int | None = None  # of computations on the CPU, on node 0; None: all cores, shared by its ranks
    num_cpus: int | None = None  # cores that the worker of node 0 offers
    run_dir: Path  # spools and logs of this attempt
    checkpoints_dir: Path  # folder of this job's checkpoints; new ones appear in it by rename
    checkpoint_prefix: (
        str  # prefix of `CheckpointSaved.filename`: checkpoints_dir relative to the service's root of them
    )

    @property
    def is_user_script(self) -> bool:
        """Whether the ranks run code that is not ours."""
        return self.entry_point is not None or self.command is not None

    @property
    def dataset_source(self) -> NamedSource:
        """The data set that is trained on."""
        return NamedSource(
            name=self.spec.dataset,
            file=self.dataset_file,
            format=self.dataset_format,
            column=self.dataset_column,
            sha256=self.dataset_sha256,
        )

    def spool_path(self, rank: int) -> Path:
        """Return the path of one rank's spool."""
        return self.run_dir / spool_name(rank)

    def checkpoint_path(self, name: str) -> Path:
        """Return the folder of one checkpoint of this job."""
        return self.checkpoints_dir / name

    def share_path(self, node_rank: int) -> Path:
        """Return the path of one further node's report: see `apt_jobs/jobs/node_share.py`."""
        return self.run_dir / f"node-{node_rank}"

    @property
    def stop_path(self) -> Path:
        """When this file exists, the ranks save a checkpoint after one or two more steps and exit 0."""
        return self.run_dir / "stop"

    @property
    def commands_path(self) -> Path:
        """Commands of the job's policies to the ranks: see `apt_jobs/jobs/commands.py`."""
        return self.run_dir / "commands.json"

    @property
    def outcome_path(self) -> Path:
        """How the ranks ended: see `apt_jobs/jobs/outcome.py`."""
        return self.run_dir / "outcome"


def spool_name(rank: int) -> str:
    """Return the file name of one rank's spool, in a job's run folder and outside of jobs."""
    return f"rank-{rank}.spool"
