"""One frozen `Settings`, built once from `APT_JOBS_*` at a process's entry and passed down."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from apt_jobs.addresses import connect_host, http_origin, is_loopback
from apt_jobs.data_folders import DataFolders
from apt_jobs.git_hosts import GitHost
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.socket_folder import find_socket
from apt_jobs.webhook_settings import WebhookSettings

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


class Settings(DataFolders, WebhookSettings, BaseSettings):
    """Everything that can be configured. Each field is an environment variable `APT_JOBS_<NAME>`.

    Args:
        **fields: Values that go before those of the environment.

    Raises:
        ValidationError: a value cannot be used. The message does not show it: it may hold a password.

    Example:
        settings = Settings(data_dir=Path("/srv/apt_jobs"), port=8080)
        print(settings.root)
    """

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
    root_path: str = Field(
        "", description="Path below which a proxy shows the service, as `/apt`. Default: the whole host is its own."
    )
    trusted_proxies: tuple[str, ...] = Field(
        (), description="Addresses or networks whose `X-Forwarded-For` and `-Proto` are believed (JSON list)."
    )
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
    max_connections_per_key: int = Field(
        800, ge=1, description="Most requests and WebSockets at once of one key or browser session in one web process."
    )
    max_connections_per_address: int = Field(
        512, ge=1, description="Most connections of one address that have shown no key; the oldest idle one gives way."
    )
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
    max_job_faults_without_checkpoint: int = Field(
        3,
        ge=1,
        description="Attempts in a row, ended by the job's own fault without a new checkpoint, until it is dead.",
    )
    max_infrastructure_faults: int = Field(
        10,
        ge=1,
        description="Attempts in a row, ended by a lost worker, machine, network or database without a new checkpoint, "
        "until a job is dead.",
    )
    retry_wait_s: float = Field(
        5.0, gt=0, description="Wait before the next attempt after a first fault, in seconds; doubles with each one."
    )
    retry_wait_max_s: float = Field(300.0, gt=0, description="Longest wait before the next attempt, in seconds.")
    max_hand_backs: int = Field(
        3, ge=1, description="Jobs in a row that a worker hands back for what it lacks until it stops claiming."
    )
    hand_back_wait_s: float = Field(
        30.0,
        gt=0,
        description="Time for which a job is kept off a worker that handed it back, in seconds; doubles each time.",
    )
    hand_back_wait_max_s: float = Field(
        600.0, gt=0, description="Longest time for which a job is kept off a worker, or a worker stops claiming."
    )
    min_free_bytes: int = Field(
        64 << 20,
        ge=0,
        description="Free bytes in the data directory below which submissions are refused and workers claim nothing.",
    )
    compile_cache_max_bytes: int = Field(
        10 << 30,
        ge=0,
        description="Size in bytes to which a starting training worker prunes the cache of compiled kernels.",
    )
    max_prepared_bytes: int = Field(
        100 << 30,
        ge=0,
        description="Bytes of prepared data sets that are kept; those not used for longest go first, none in use.",
    )
    max_cpu_ranks: int = Field(4, ge=1, le=64, description="Most ranks of a training job on a worker without GPUs.")
    max_jobs_per_worker: int = Field(16, ge=1, le=256, description="Most training jobs that one worker runs at once.")
    worker_cpus: int = Field(
        0, ge=0, le=4_096, description="CPU cores of a training worker's jobs together; 0: all that it may use."
    )
    worker_memory_gb: float = Field(
        0.0, ge=0, le=1_000_000, description="Memory of its jobs together, in GB (10**9 bytes); 0: all of the machine."
    )
    gpu_memory_fractions: dict[int, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict,
        description="Part of a GPU's memory that this worker's processes use together, by index (JSON object), where "
        'another shares the GPU: {"0": 0.75}. Default: all, but `apt-jobs up` shares GPU 0.',
    )
    reserve_after_s: float = Field(
        300.0, ge=0, description="A job that waited so long for room is kept free room on one worker, in seconds."
    )
    preemption: bool = Field(
        True, description="A waiting job that no free room serves makes running jobs of lower priority save and yield."
    )
    preemption_exempt_s: float = Field(
        30.0, ge=0, description="An attempt is not preempted before it has run for so long, in seconds."
    )
    max_preemptions: int = Field(10, ge=0, description="Times that a job is preempted at most; then it runs on.")
    rendezvous_host: str = Field(
        "127.0.0.1", description="Name of a head worker's machine under which its nodes reach it."
    )
    rendezvous_port: int = Field(
        0, ge=0, le=65535, description="TCP port where a head worker's nodes meet it. 0: any free one."
    )
    network_interface: str | None = Field(
        None, description="Network interface on which nodes listen. Default: the one of `rendezvous_host`."
    )
    models_dir: Path | None = Field(
        None, description="Folder of local Hugging Face models. Default: `models` in the data directory."
    )
    entry_points: dict[str, str] = Field(
        default_factory=dict,
        description="Training code a worker may run by name: `module:function` or a `.py` script (JSON object).",
    )
    pass_environment: tuple[str, ...] = Field(
        (), description="Further variables of a worker's environment that training jobs see, by name (JSON list)."
    )
    allow_code: Literal["off", "admin", "submitter"] | None = Field(
        None,
        description="Who may run code of their own (`apt-jobs run`), as the workers' user: off, admin, or submitter. "
        "Default: submitter where all is on loopback and no proxy is named, else off.",
    )
    job_max_file_bytes: int = Field(
        0, ge=0, description="Largest file that a process of a user script may write, in bytes; 0: any."
    )
    job_max_processes: int = Field(
        0,
        ge=0,
        description="Processes of the workers' user beyond which a user script starts none; 0: any. Not for root.",
    )
    secrets_key: SecretStr | None = Field(
        None,
        description="Key that encrypts secrets of jobs, of `apt-jobs secrets new-key`; of several, with commas, "
        "the first encrypts. Default: `secrets.key` in the data directory, made with the first secret.",
    )
    max_code_bytes: int = Field(50 << 20, ge=1024, description="Largest packed folder of code, in bytes.")
    git_hosts: tuple[str, ...] = Field(
        (),
        description="Where jobs may fetch code from: `github.com` (by https), `github.com/team`, `ssh://git@host`, "
        "`file:///srv/git` (JSON list).",
    )
    max_git_bytes: int = Field(1 << 30, ge=1024, description="Largest commit that is fetched, in bytes.")
    git_timeout_s: float = Field(300.0, gt=0, description="Longest time to fetch a commit, in seconds.")
    environments: dict[str, str] = Field(
        default_factory=dict,
        description="Python environments that jobs may name, each a folder of venv or conda (JSON object).",
    )
    max_environments_bytes: int = Field(
        100 << 30,
        ge=0,
        description="Bytes of built environments that are kept; those not used for longest go first, none in use.",
    )
    environment_days: float = Field(
        30.0, gt=0, le=3650, description="An environment that no job used for so many days is removed."
    )
    environment_timeout_s: float = Field(
        1200.0, gt=0, description="Longest time to build an environment, or to wait for one that is being built."
    )
    generate_concurrency: int = Field(8, ge=1, le=64, description="Generation jobs that one worker serves at once.")
    generate_threads: int = Field(
        0, ge=0, le=1_024, description="Threads of a generation worker's computations on CPU; 0: half of the cores."
    )
    engine_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="An OpenAI-compatible server, as `http://127.0.0.1:8000/v1`: its models generate here, too, by the "
        "workers that have this setting.",
    )
    engine_api_key: SecretStr | None = Field(None, description="Sent to `APT_JOBS_ENGINE_URL`.")
    engine_timeout_s: float = Field(
        120.0, gt=0, le=3600, description="Longest silence of `APT_JOBS_ENGINE_URL` while a text is waited for."
    )
    generate_compile: bool = Field(
        True, description="On a GPU, have what a generation worker runs often compiled, behind the running graphs."
    )
    warm_models: int = Field(2, ge=1, le=16, description="Models that a generation worker keeps in memory.")
    warm_adapters: int = Field(
        8, ge=1, le=64, description="LoRA adapters that a generation worker keeps beside each model, which they share."
    )
    retention: RetentionPolicy | None = Field(
        None,
        description='What is removed, each hour, as {"days": 90} (JSON object; `docs/how-to/retention.md`). '
        "Default: nothing.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address on which workers with `--metrics-port` are scraped.")
    log_level: str = Field("INFO", description="Least severe level that is logged.")

    @field_validator("host", "metrics_host")
    @classmethod
    def _host_is_an_address(cls, host: str) -> str:
        host = host.strip()
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not bare or "/" in bare or bare.isdecimal() or (":" in bare and bare.count(":") < 2):
            raise ValueError(f"{host!r} is no address to bind to; write 127.0.0.1, ::1, a name, or 0.0.0.0 for all")
        return bare

    @field_validator("data_dir", "models_dir")
    @classmethod
    def _directory_can_be_named(cls, path: Path | None) -> Path | None:
        text = str(path or "")
        if not text.isprintable():  # neither control characters nor bytes that are not UTF-8: logs and URLs carry it
            raise ValueError(f"the directory {text!a} has signs that cannot be printed; choose another name")
        return path

    @field_validator("root_path")
    @classmethod
    def _root_path_is_a_path(cls, root_path: str) -> str:
        root_path = root_path.rstrip("/")
        segments = root_path.split("/")
        if not _ROOT_PATH.fullmatch(root_path) or "." in segments or ".." in segments:
            raise ValueError(f"{root_path!r} is no path of a URL; write it as /apt or /tools/apt")
        return root_path

    @field_validator("allow_code", mode="before")
    @classmethod
    def _allow_code_may_be_a_switch(cls, value: Any) -> Any:
        words = {"true": "submitter", "1": "submitter", "yes": "submitter", "false": "off", "0": "off", "no": "off"}
        return words.get(str(value).strip().lower(), value)

    @field_validator("entry_points")
    @classmethod
    def _no_entry_point_is_named_code(cls, entry_points: dict[str, str]) -> dict[str, str]:
        if "code" in entry_points:
            raise ValueError("the name 'code' is for jobs that bring their own; call the entry point otherwise")
        return entry_points

    @field_validator("allowed_hosts")
    @classmethod
    def _allowed_hosts_are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not host or any(sign in host for sign in "/@*, "):
                raise ValueError(f"{host!r} is no value of a Host header; write jobs.example or jobs.example:8443")
        return hosts

    @field_validator("git_hosts")
    @classmethod
    def _git_hosts_are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            GitHost.parse(host)
        return hosts

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as exc:
                raise ValueError(f"{exc}; write an address or a network, as 127.0.0.1 or 10.0.0.0/8") from exc
        return proxies

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
        if parts.scheme != "unix" and not is_loopback(parts.hostname or "") and not parts.password:
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
        """Where processes of this machine reach the web process, which is not always what it binds to."""
        return http_origin(connect_host(self.host), self.port) + self.root_path

    @property
    def browser_url(self) -> str:
        """Where browsers find the service: the first of `allowed_hosts`, else where this machine does."""
        if not self.allowed_hosts:
            return self.own_url
        return f"{'https' if self.https else 'http'}://{self.allowed_hosts[0]}{self.root_path}"

    @property
    def code_role(self) -> Literal["admin", "submitter"] | None:
        """Role that may run code of its own; None: nobody may."""
        if self.allow_code is not None:
            return None if self.allow_code == "off" else self.allow_code
        redis = urlsplit("unix:" if self.redis_url is None else self.redis_url.get_secret_value())
        is_alone = is_loopback(self.host) and (redis.scheme == "unix" or is_loopback(redis.hostname or ""))
        has_proxy = bool(self.allowed_hosts or self.trusted_proxies or self.https or self.root_path)
        return "submitter" if is_alone and not has_proxy else None

    @property
    def database(self) -> str:
        """SQLAlchemy URL, password included: never log it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{quote(str(self.root / 'apt_jobs.sqlite3'))}"

    @property
    def redis(self) -> str:
        """Redis URL, password included: never log it. Default: the embedded Valkey's unix socket."""
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        return f"unix://{quote(str(self.valkey_socket))}?db=0"

    @property
    def valkey_dir(self) -> Path:
        """Where the embedded Valkey keeps its append-only file."""
        return self.root / "valkey"

    @property
    def valkey_socket(self) -> Path:
        """Socket of the embedded Valkey, in a folder that only its owner may enter.

        Raises:
            Denied: others can enter the folder that is recorded for it.
        """
        return find_socket(self.valkey_dir)

    @property
    def local_models_dir(self) -> Path:
        return self.models_dir.expanduser().resolve() if self.models_dir else self.root / "models"
