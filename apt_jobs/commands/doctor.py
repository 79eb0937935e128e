"""`apt-jobs doctor`: look at all that a service needs on this machine, and say of each what to do. Changes nothing."""

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import httpx
import typer

from apt_jobs.commands.terminal import AsJson, echo, load_settings, print_json
from apt_jobs.errors import AptJobsError
from apt_jobs.settings import Settings

app = typer.Typer()
TIMEOUT_S = 5.0
MAX_CLOCK_DIFFERENCE_S = 2.0
OLDEST_PYTHON = (3, 11)
Level = Literal["ok", "note", "fault"]
Verdict = tuple[Level, str]
STYLES = {"ok": "green", "note": "yellow", "fault": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one part. A `note` keeps some use of the service back, a `fault` all of it."""

    part: str
    level: Level
    text: str


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check what a service needs of this machine, and say what to do; the exit status is 1 if something is at fault."""
    findings = list(findings_of(load_settings()))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        width = max(len(finding.part) for finding in findings)
        for finding in findings:
            echo(f"{finding.level:5}  {finding.part:{width}}  {finding.text}", style=STYLES[finding.level])
    if any(finding.level == "fault" for finding in findings):
        raise typer.Exit(1)


def findings_of(settings: Settings) -> Iterator[Finding]:
    """Yield what there is to know, part by part. No part keeps another one from being looked at."""
    checks: tuple[tuple[str, Callable[[Settings], Verdict]], ...] = (
        ("python", _python),
        ("torch", _torch),
        ("gpus", _gpus),
        ("permissions", _permissions),
        ("disk", _disk),
        ("database", _database),
        ("clock", _clock),
        ("broker", _broker),
        ("port", _port),
    )
    for part, check in checks:
        try:
            level, text = check(settings)
        except AptJobsError as exc:
            level, text = "fault", str(exc)
        except Exception as exc:  # says so, and the other parts are looked at
            level, text = "fault", f"it cannot be checked: {type(exc).__name__}: {exc}"
        yield Finding(part, level, text)


def _python(_settings: Settings) -> Verdict:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return "fault", f"{version}; apt_jobs needs 3.11 or newer: make an environment with one"
    return "ok", f"{version} in {sys.prefix}"


def _torch(_settings: Settings) -> Verdict:
    if importlib.util.find_spec("torch") is None:
        return "note", "not installed: nothing is trained or generated here; pip install 'apt-jobs[train]'"
    return "ok", importlib.metadata.version("torch")


def _gpus(_settings: Settings) -> Verdict:
    from apt_jobs.workers.gpus import describe_gpus, find_gpus

    found = describe_gpus(find_gpus(None))
    if not found:
        return "note", "none is visible: trainings run on the CPU; nvidia-smi shows whether the driver sees one"
    return "ok", ", ".join(f"{gpu['index']}: {gpu['name']}" for gpu in found)


def _permissions(settings: Settings) -> Verdict:
    folder = settings.root
    if not folder.exists():
        parent = next(one for one in folder.parents if one.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            return "fault", f"{folder} is not there and {parent} is not writable: set APT_JOBS_DATA_DIR, or chmod it"
        return "note", f"{folder} is not there yet: apt-jobs up makes it"
    if not folder.is_dir():
        return "fault", f"{folder} is no folder: set APT_JOBS_DATA_DIR"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return "fault", f"{folder} is not writable for this user: chown it, or set APT_JOBS_DATA_DIR"
    if folder.stat().st_mode & 0o077:
        return "note", f"others may look into {folder}, which holds keys: chmod 700 it"
    return "ok", f"{folder} is this user's alone"


def _disk(settings: Settings) -> Verdict:
    folder = next(one for one in (settings.root, *settings.root.parents) if one.exists())
    free_bytes = shutil.disk_usage(folder).free
    text = f"{free_bytes / 1e9:,.1f} GB are free at {folder}"
    if free_bytes < settings.min_free_bytes:
        return (
            "fault",
            f"{text}; {settings.min_free_bytes / 1e9:,.1f} GB have to be: until then no job is taken",
        )
    return "ok", text


def _database(settings: Settings) -> Verdict:
    from apt_jobs.db.engine import Database
    from apt_jobs.db.upgrade import require_current_schema

    if (file := _embedded_file(settings)) is not None and not file.exists():
        return "note", f"{file} is not there yet: apt-jobs up makes it"
    database = Database(settings.database)
    try:
        database.ping()
        require_current_schema(database)
    finally:
        database.dispose()
    return "ok", f"{database.dialect} answers, with the schema of this version"


def _clock(settings: Settings) -> Verdict:
    from apt_jobs.db.engine import Database
    from apt_jobs.db.schedules import database_now

    if _embedded_file(settings) is not None:
        return "ok", "the database's is this machine's"
    database = Database(settings.database)
    try:
        with database.read() as session:
            difference_s = (datetime.now(UTC) - database_now(session)).total_seconds()
    finally:
        database.dispose()
    if abs(difference_s) > MAX_CLOCK_DIFFERENCE_S:
        return "note", f"{difference_s:+.1f} s from the database's, which leases and schedules go by: run an NTP client"
    return "ok", f"{difference_s:+.1f} s from the database's"


def _broker(settings: Settings) -> Verdict:
    import redis

    if settings.redis_url is None and not settings.valkey_dir.exists():
        return "note", "the embedded Valkey has not run yet: apt-jobs up starts it"
    client = redis.Redis.from_url(settings.redis, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
    try:
        client.ping()
    except redis.RedisError as exc:
        if settings.redis_url is None:
            return "note", "the embedded Valkey does not run: apt-jobs up starts it"
        return "fault", f"it does not answer: {exc}; check APT_JOBS_REDIS_URL and that it runs"
    finally:
        client.close()
    return "ok", "it answers"


def _port(settings: Settings) -> Verdict:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", settings.port))
        return "ok", f"{settings.port} is free"
    except PermissionError:
        return "fault", f"{settings.port} needs root: set APT_JOBS_PORT to one above 1023"
    except OSError:
        pass
    try:
        answer = httpx.get(f"http://127.0.0.1:{settings.port}/healthz", timeout=TIMEOUT_S, trust_env=False)
    except httpx.HTTPError:
        answer = None
    if answer is not None and answer.status_code == httpx.codes.OK:
        return "ok", f"the service answers at {settings.port}"
    return "fault", f"another program has {settings.port}: end it, or set APT_JOBS_PORT"


def _embedded_file(settings: Settings) -> Path | None:
    return settings.root / "apt_jobs.sqlite3" if settings.database_url is None else None
