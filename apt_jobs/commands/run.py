"""`apt-jobs run`: this folder's code as a job, its output followed to its own exit status."""

from pathlib import Path
from typing import Annotated, Any

import typer

from apt_jobs.client.client import Client, Job
from apt_jobs.client.packing import pack_folder
from apt_jobs.commands.terminal import complain, echo, open_client
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.printable import escaped
from apt_jobs.jobs.python_environment import listed_packages
from apt_jobs.run.log_command import log_command

app = typer.Typer()
LAUNCHERS = ("auto", "none", "torchrun")
_INTERPRETERS = ("python", "python3")
_MEGABYTE = 1 << 20
_MAX_TITLE_CHARS = 200


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments, after --. No shell reads it.")],
    workdir: Annotated[Path, typer.Option(help="Folder of the code, in which the command runs.")] = Path(),
    gpus: Annotated[int, typer.Option(min=0, max=512, help="GPUs that it needs; 0: one process wherever.")] = 0,
    launcher: Annotated[
        str, typer.Option(help="torchrun: a process for each GPU; none: one that starts others itself; or auto.")
    ] = "auto",
    name: Annotated[str | None, typer.Option(help="Shown in lists. Default: the command.")] = None,
    queue: Annotated[str | None, typer.Option(help="Queue to wait in.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set of `current_run().dataset()`.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, no secret; may be repeated.")] = None,
    secret: Annotated[list[str] | None, typer.Option(help="Name of apt-jobs secrets; may be repeated.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="key=value; may be repeated.")] = None,
    requirements: Annotated[
        Path | None, typer.Option(help="File of packages to install for it, one a line, as trl>=1.16.")
    ] = None,
    lock: Annotated[
        str | None, typer.Option(help="File of the folder that pins all packages, as of uv pip compile.")
    ] = None,
    python: Annotated[str | None, typer.Option(help="Version of Python for those packages, as 3.12.")] = None,
    environment: Annotated[str | None, typer.Option(help="Environment that the operator registered.")] = None,
    git: Annotated[
        str | None,
        typer.Option(help="Run a commit instead of this folder: https://host/path.git@COMMIT, its whole name."),
    ] = None,
    max_mb: Annotated[int, typer.Option(min=1, max=100_000, help="Largest packed folder.")] = 50,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Do not follow it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be packed, and submit nothing.")] = False,
) -> None:
    """Run this folder's code as a job: pack what git does not ignore, submit, follow; exits as the command does.

    Ctrl-C only stops following.
    """
    job = _job(command, gpus, launcher, {"queue": queue, "dataset": dataset, "name": name}, env or [], label or [])
    job |= {"secrets": secret or [], **_environment(requirements, lock, python, environment)}
    if dry_run:
        _show_packed(workdir, max_mb)
        return
    with open_client() as client:
        submitted = client.submit({**job, "code": _commit(git) if git else _packed(client, workdir, max_mb)})
        if detach:
            echo(submitted.id)
            return
        complain(f"{submitted.id} is {submitted.state}; apt-jobs cancel {submitted.id} ends it")
        status = _exit_status(_follow_output(client, submitted))
    raise typer.Exit(status)


@app.command(context_settings={"ignore_unknown_options": True})
def log(
    arguments: Annotated[list[str] | None, typer.Argument(help="NAME=VALUE ... --step N; --help lists all.")] = None,
) -> None:
    """Log metrics, a line, an image or progress to the job that this process belongs to."""
    raise typer.Exit(log_command(arguments or []))


def _job(
    command: list[str], gpus: int, launcher: str, given: dict[str, str | None], env: list[str], label: list[str]
) -> dict[str, Any]:
    if launcher not in LAUNCHERS:
        raise InvalidInput(f"--launcher {launcher!r} is none of {', '.join(LAUNCHERS)}")
    if launcher == "auto":
        launcher = "torchrun" if gpus > 1 and Path(command[0]).name in _INTERPRETERS else "none"
    job: dict[str, Any] = {"kind": "train", "argv": command, "launcher": launcher, "num_ranks": max(gpus, 1)}
    job |= {key: value for key, value in given.items() if value is not None}
    job.setdefault("name", escaped(" ".join(command))[:_MAX_TITLE_CHARS])
    if gpus:
        job["device"] = "cuda"
    return job | {"env": _pairs(env, "--env"), "labels": _pairs(label, "--label")}


def _environment(
    requirements: Path | None, lock: str | None, python: str | None, name: str | None
) -> dict[str, dict[str, Any]]:
    """Return the job's `environment`, if any option asks for one."""
    listed = None if requirements is None else _packages_of(requirements)
    if python is not None and listed is None and lock is None:
        listed = []
    given = {"requirements": listed, "lock": lock, "python": python, "name": name}
    environment = {key: value for key, value in given.items() if value is not None}
    return {"environment": environment} if environment else {}


def _packages_of(file: Path) -> list[str]:
    try:
        return listed_packages(file.read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidInput(f"--requirements {str(file)!r} cannot be read: {exc}") from exc


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise InvalidInput(f"{option} {text!r} is no NAME=VALUE")
        pairs[name] = value
    return pairs


def _commit(text: str) -> dict[str, Any]:
    url, sign, commit = text.rpartition("@")
    if not sign:
        raise InvalidInput(f"--git {text!r} names no commit; write https://host/path.git@COMMIT")
    return {"git": {"url": url, "commit": commit}}


def _packed(client: Client, workdir: Path, max_mb: int) -> dict[str, Any]:
    code = client.upload_code(workdir, max_mb * _MEGABYTE)
    complain(f"{workdir} is {_counted(code['num_files'])}, {_origin(code)}")
    return {"sha256": code["sha256"]}


def _show_packed(workdir: Path, max_mb: int) -> None:
    with pack_folder(workdir, max_mb * _MEGABYTE) as packed:
        for name in packed.names:
            echo(name)
        complain(f"{_counted(packed.num_files)}, {packed.size_bytes:,} bytes, sha256 {packed.sha256}")


def _counted(num_files: int) -> str:
    return f"{num_files:,} file" + ("s" if num_files != 1 else "")


def _origin(code: dict[str, Any]) -> str:
    if code["commit"] is None:
        return "in no commit of git"
    changed = " with changes" if code["is_dirty"] else ""
    return f"commit {code['commit'][:12]}{changed}" + (f" on {code['branch']}" if code["branch"] else "")


def _follow_output(client: Client, job: Job) -> Job:
    """Print what the job prints until it has ended. Lines of several ranks say whose they are."""
    has_ranks = job["spec"]["launcher"] == "torchrun" and job["spec"]["num_ranks"] > 1
    after = 0
    while not job.is_ended:  # it may be retried as soon as it has ended
        for event in client.events(job.id, after=after, kinds=("log", "state")):
            after = event["seq"]
            if event["kind"] == "state":
                if event["state"] not in ("running", "succeeded"):
                    reason = f": {event['reason']}" if event.get("reason") else ""
                    complain(f"{job.id} is {event['state']}{reason}")
            elif event["source"].startswith("rank ") and not has_ranks:
                echo(event["message"], keep="\t")
            else:
                echo(f"[{event['source']}] {event['message']}", keep="\t")
        job = client.get(job.id)
    return job


def _exit_status(job: Job) -> int:
    """Return how the command exited; 1 of a job that ended otherwise."""
    if job.state == "succeeded":
        return 0
    status = (job.get("error") or {}).get("exit_status")
    return status if isinstance(status, int) and 0 < status < 256 else 1
