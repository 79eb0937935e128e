"""One frozen `Settings`, built once from `APT_JOBS_*` at a process's entry and passed down."""

import hashlib
import tempfile
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

UNIX_SOCKET_PATH_MAX = 100  # unix(7): sun_path holds 108 bytes
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


class Settings(BaseSettings):
    """Everything that can be configured. Each field is an environment variable `APT_JOBS_<NAME>`."""

    model_config = SettingsConfigDict(
        env_prefix="APT_JOBS_",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # the input has the passwords
    )

    data_dir: Path = Field(Path(".apt_jobs"), description="Where the database, checkpoints, data sets and logs live.")
    database_url: SecretStr | None = Field(
        None, description="SQLAlchemy URL of Postgres or SQLite. Default: SQLite in the data directory."
    )
    redis_url: SecretStr | None = Field(
        None, description="URL of Redis or Valkey. Default: the embedded Valkey that `apt-jobs up` starts."
    )
    host: str = Field("127.0.0.1", description="Address that the web process binds to.")
    port: int = Field(8000, ge=1, le=65535, description="TCP port of the web process.")
    allowed_hosts: tuple[str, ...] = Field(
        (), description="Further values of the `Host` header, `name` or `name:port`, that are answered (JSON list)."
    )
    https: bool = Field(False, description="The service is reached through HTTPS: cookies are `Secure`.")
    session_hours: float = Field(168.0, gt=0, le=8760, description="How long a browser session lasts, in hours.")
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest JSON body of a request, in bytes.")
    max_upload_bytes: int = Field(1 << 30, ge=1024, description="Largest data set that can be uploaded, in bytes.")
    request_timeout_s: float = Field(
        30.0, gt=0, description="Longest time for a request's head or JSON body to arrive, or a client to read on."
    )
    generate_wait_s: float = Field(
        120.0, gt=0, le=600, description="Longest time that `POST /api/generate` waits for its job."
    )
    max_connections: int = Field(1000, ge=1, description="Most requests and WebSockets at once in one web process.")
    max_queued_jobs: int = Field(10_000, ge=1, description="Most jobs that may wait; further ones are refused.")
    lease_s: float = Field(60.0, ge=3, description="How long an attempt owns its job after a heartbeat.")
    heartbeat_s: float = Field(10.0, gt=0, description="Time between two heartbeats of an attempt.")
    stop_timeout_s: float = Field(10.0, gt=0, description="Time between SIGTERM and SIGKILL for a process tree.")
    drain_timeout_s: float = Field(
        120.0, gt=0, description="Longest time that a worker's shutdown waits for a checkpoint of its job."
    )
    stall_timeout_s: float = Field(
        1800.0, gt=0, description="A training that tells and prints nothing for so long is ended as hung."
    )
    max_cpu_ranks: int = Field(4, ge=1, le=64, description="Most ranks of a training job on a worker without GPUs.")
    rendezvous_host: str = Field(
        "127.0.0.1", description="Name of a head worker's machine under which its nodes reach it."
    )
    rendezvous_port: int = Field(
        0, ge=0, le=65535, description="TCP port where a head worker's nodes meet it. 0: any free one."
    )
    network_interface: str | None = Field(
        None, description="Network interface between nodes, for gloo and NCCL. Default: they choose."
    )
    models_dir: Path | None = Field(
        None, description="Folder of local Hugging Face models. Default: `models` in the data directory."
    )
    entry_points: dict[str, str] = Field(
        default_factory=dict,
        description="Training code a worker may run by name: `module:function` or a `.py` script (JSON object).",
    )
    generate_concurrency: int = Field(8, ge=1, le=64, description="Generation jobs that one worker serves at once.")
    generate_threads: int = Field(
        0, ge=0, le=1_024, description="Threads of a generation worker's computations on CPU; 0: half of the cores."
    )
    generate_compile: bool = Field(
        True, description="On a GPU, have what a generation worker runs often compiled, behind the running graphs."
    )
    warm_models: int = Field(2, ge=1, le=16, description="Models that a generation worker keeps in memory.")
    log_level: str = Field("INFO", description="Least severe level that is logged.")

    @model_validator(mode="after")
    def _leases_outlast_heartbeats(self) -> Self:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"APT_JOBS_LEASE_S={self.lease_s} must be at least twice APT_JOBS_HEARTBEAT_S={self.heartbeat_s}"
            )
        return self

    @model_validator(mode="after")
    def _no_open_redis_beyond_loopback(self) -> Self:
        if self.redis_url is None:
            return self
        parts = urlsplit(self.redis_url.get_secret_value())
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError("APT_JOBS_REDIS_URL begins with neither redis://, rediss:// nor unix://")
        if parts.scheme != "unix" and parts.hostname not in LOOPBACK_HOSTS and not parts.password:
            raise ValueError(
                f"APT_JOBS_REDIS_URL names {parts.hostname!r} without a password: a Redis off loopback needs one"
            )
        return self

    @property
    def root(self) -> Path:
        """The data directory as an absolute path."""
        return self.data_dir.expanduser().resolve()

    @property
    def own_url(self) -> str:
        """Where the web process answers on this machine."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def browser_url(self) -> str:
        """Where browsers find the service: the first of `allowed_hosts`, else where it binds to."""
        return f"{'https' if self.https else 'http'}://{self.allowed_hosts[0]}" if self.allowed_hosts else self.own_url

    @property
    def database(self) -> str:
        """SQLAlchemy URL, password included: never log it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.root / 'apt_jobs.sqlite3'}"

    @property
    def redis(self) -> str:
        """Redis URL, password included: never log it. Default: the embedded Valkey's unix socket."""
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        return f"unix://{self.valkey_socket}?db=0"

    @property
    def valkey_socket(self) -> Path:
        """Socket of the embedded Valkey, in a folder that only its owner may enter."""
        path = self.root / "valkey" / "valkey.sock"
        if len(str(path)) < UNIX_SOCKET_PATH_MAX:
            return path
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"apt-jobs-{digest}" / "valkey.sock"

    @property
    def checkpoints_dir(self) -> Path:
        return self.root / "checkpoints"

    @property
    def datasets_dir(self) -> Path:
        return self.root / "datasets"

    @property
    def runs_dir(self) -> Path:
        """One folder per attempt: spools, rank logs, the run file."""
        return self.root / "runs"

    @property
    def local_models_dir(self) -> Path:
        return self.models_dir.expanduser().resolve() if self.models_dir else self.root / "models"
