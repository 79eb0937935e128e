"""Prepares what an attempt runs in, then becomes its command: `python -m apt_jobs.supervision.set_up RUN_FILE ...`.

It is the first process of the attempt's tree, so a build is cancelled, timed and logged as all else that the job runs.
It holds the lock of the environment, and so does the command that it becomes.
"""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import apt_jobs
from apt_jobs.artifacts.environments import EnvironmentBuilder, find_environment
from apt_jobs.artifacts.git_code import GitFetcher
from apt_jobs.artifacts.paths import inside
from apt_jobs.errors import AptJobsError, InvalidInput, OutOfSpace, WorkerLacks
from apt_jobs.events.kinds import RankFailed
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.attempt_facts import PythonFacts
from apt_jobs.jobs.outcome import Outcome, write_outcome
from apt_jobs.jobs.python_environment import MAX_LOCK_BYTES, PythonEnvironment, read_lock
from apt_jobs.jobs.run_file import EnvironmentPlan, RunFile
from apt_jobs.private_files import PRIVATE_UMASK
from apt_jobs.supervision.attempt_facts import PYTHON_FACTS, installed_packages
from apt_jobs.supervision.rank_logs import SET_UP_LOG

LIGHT_FOLDER = "python"  # of an attempt: `apt_jobs` alone, so that every Python finds the run and nothing else
BUILD_VARIABLES = "UV_"  # the operator's settings of uv: for the build, not for the job


class StopRequested(Exception):
    """The attempt was asked to stop before its command began."""


def needs_set_up(run_file: RunFile) -> bool:
    """Return whether something has to be prepared before the command starts."""
    return run_file.environment is not None or run_file.git is not None


def light_path(run_file: RunFile) -> Path:
    """Return the folder that has this package alone, made if it is missing."""
    folder = run_file.run_dir / LIGHT_FOLDER
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):  # of another node
        (folder / "apt_jobs").symlink_to(Path(apt_jobs.__file__).parent)
    return folder


def main(arguments: Sequence[str]) -> int:
    """Entry of the process.

    Returns:
        The exit status, where the command cannot be started.
    """
    os.umask(PRIVATE_UMASK)
    file, *command = arguments
    run_file = RunFile.model_validate_json(Path(file).read_text())
    (run_file.run_dir / SET_UP_LOG).touch()
    try:
        _fetch_code(run_file)
        environment = _command_environment(run_file)
    except StopRequested:
        write_outcome(run_file.outcome_path, Outcome.STOPPED)
        return 0
    except (AptJobsError, OSError) as caught:
        exc = _of_the_machine(caught) if isinstance(caught, OSError) else caught
        with SpoolWriter(run_file.spool_path(0)) as spool:
            spool.append(RankFailed(0, type(exc).__name__, str(exc), "", exit_status=1))
        return 1
    os.execve(command[0], command, environment)  # noqa: S606  # a list, no shell
    return None


def _of_the_machine(error: OSError) -> AptJobsError:
    """Return what a fault of the file system means: another worker may do it."""
    message = f"the attempt cannot be prepared: {error.strerror or error}"
    return OutOfSpace(message) if error.errno in (errno.ENOSPC, errno.EDQUOT) else WorkerLacks(message)


def _fetch_code(run_file: RunFile) -> None:
    """Fetch the commit that the job names, into its folder."""
    code = run_file.spec.code
    if run_file.git is None or code is None or code.git is None:
        return
    assert run_file.output_dir is not None  # of every user script
    fetcher = GitFetcher(run_file.git, run_file.run_dir / SET_UP_LOG, _own_environment(run_file), _stop_check(run_file))
    fetcher.write(code.git, run_file.output_dir)


def _own_environment(run_file: RunFile) -> dict[str, str]:
    """Return what git and uv see: nothing that the job brought, as others share what they make."""
    of_the_job = {*run_file.spec.env, *run_file.spec.secrets}
    return {name: value for name, value in os.environ.items() if name not in of_the_job}


def _stop_check(run_file: RunFile) -> Callable[[], None]:
    def check() -> None:
        if run_file.stop_path.exists():
            raise StopRequested

    return check


def _command_environment(run_file: RunFile) -> dict[str, str]:
    """Return what the command sees, its Python first in its PATH."""
    of_the_job = {*run_file.spec.env, *run_file.spec.secrets}
    kept = {n: v for n, v in os.environ.items() if not n.startswith(BUILD_VARIABLES) or n in of_the_job}
    plan, wanted = run_file.environment, run_file.spec.environment
    if plan is None or wanted is None:
        return kept
    folder = plan.registered_dir or _built(run_file, plan, wanted)
    _write_facts(run_file, folder, wanted)
    path = os.pathsep.join([str(folder / "bin"), kept.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(folder)}


def _built(run_file: RunFile, plan: EnvironmentPlan, wanted: PythonEnvironment) -> Path:
    builder = EnvironmentBuilder(plan, run_file.run_dir / SET_UP_LOG, _own_environment(run_file), _stop_check(run_file))
    folder, lock = builder.provide(_packages(run_file, wanted), is_lock=wanted.lock is not None)
    lock.keep_over_exec()
    return folder


def _write_facts(run_file: RunFile, folder: Path, wanted: PythonEnvironment) -> None:
    """Note the packages of the environment for the supervisor, in a file that appears whole."""
    record = find_environment(folder)
    if record is not None:
        facts = PythonFacts(python=record.python, packages=record.packages, environment=folder.name)
    else:
        packages = installed_packages(map(str, folder.glob("lib/python3*/site-packages")))
        command = [str(folder / "bin" / "python"), "-c", "import platform; print(platform.python_version())"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60.0)
        facts = PythonFacts(python=asked.stdout.strip()[:100], packages=packages, environment=wanted.name)
    temporary = run_file.run_dir / f".{PYTHON_FACTS}"
    temporary.write_text(facts.model_dump_json())
    temporary.rename(run_file.run_dir / PYTHON_FACTS)


def _packages(run_file: RunFile, wanted: PythonEnvironment) -> str:
    if wanted.lock is None:
        return "".join(f"{word}\n" for word in sorted(set(wanted.requirements or ())))
    assert run_file.output_dir is not None  # of every user script
    file = inside(run_file.output_dir, wanted.lock)
    if file is None or not file.is_file():
        raise InvalidInput(f"the job's code has no file {wanted.lock!r}, which its environment names as the lock")
    with file.open("rb") as opened:
        return read_lock(opened.read(MAX_LOCK_BYTES + 1), wanted.lock)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
