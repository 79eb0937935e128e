"""What torchrun starts on every rank: `torchrun -m apt_jobs.training.run --run-file PATH`.

Reads the run file, runs the built-in trainer, the registered entry point or the job's own command, and leaves in the
spool why it failed.

An entry point is a script, which is run as `__main__` with the job's arguments as `--name=value`, or a function:

    def train(run_file: RunFile, spool: SpoolWriter) -> None:
        steps = run_file.spec.arguments.get("steps", 100)
        ...
"""

import argparse
import atexit
import importlib
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from apt_jobs.errors import InvalidInput, TrainingFailed
from apt_jobs.events.current_spool import spool_of_job
from apt_jobs.events.kinds import RankFailed
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.environment import as_flag
from apt_jobs.jobs.outcome import Outcome, write_outcome
from apt_jobs.jobs.run_file import SCRIPT_SUFFIX, RunFile
from apt_jobs.run.command import run_command
from apt_jobs.run.parent import die_with_parent
from apt_jobs.run.stopping import STOPPED
from apt_jobs.training.torchrun import read_rank_info

BUILT_IN = "apt_jobs.training.loop:train"  # imported like any other: user scripts do not wait for it


def main() -> int:
    """Run one rank of an attempt.

    Returns:
        The exit status: 0, or 1 when the training failed and the spool says why.

    Raises:
        ValidationError: the run file is damaged.
        OSError: the run file or the spool cannot be opened.

    Example:
        torchrun --nproc-per-node=2 -m apt_jobs.training.run --run-file run.json
    """
    die_with_parent(signal.SIGKILL)  # ranks have sessions of their own: killing torchrun would leave them on the GPUs
    parser = argparse.ArgumentParser(description="One rank of a training attempt.")
    parser.add_argument("--run-file", type=Path, required=True)
    run_file = RunFile.model_validate_json(parser.parse_args().run_file.read_text())
    rank = read_rank_info().rank
    if run_file.command is not None:
        return run_command(rank)
    with SpoolWriter(run_file.spool_path(rank)) as spool:
        try:
            with spool_of_job(spool):
                _entry(run_file)(run_file, spool)
        except BaseException as exc:  # the edge of the process: record, then fail
            spool.append(RankFailed(rank, type(exc).__name__, str(exc), traceback.format_exc()))
            traceback.print_exc()
            return 1
    return 0


def _entry(run_file: RunFile) -> Callable[[RunFile, SpoolWriter], None]:
    """Return the function to run; a registered one comes from the worker's settings, never from a message."""
    if run_file.entry_point is None:
        return _imported(BUILT_IN)
    is_script = run_file.entry_point.endswith(SCRIPT_SUFFIX)
    function = _run_script if is_script else _imported(run_file.entry_point)

    def run(run_file: RunFile, spool: SpoolWriter) -> None:
        if run_file.output_dir is not None:
            run_file.output_dir.mkdir(parents=True, exist_ok=True)  # on a further node, without a shared file system
            os.chdir(run_file.output_dir)
        function(run_file, spool)
        if read_rank_info().rank == 0:
            has_stopped = (run_file.run_dir / STOPPED).exists()
            write_outcome(run_file.outcome_path, Outcome.STOPPED if has_stopped else Outcome.FINISHED)

    return run


def _run_script(run_file: RunFile, spool: SpoolWriter) -> None:
    """As `python script.py ARGV --name=value ...` would, in this process and in the job's output folder."""
    assert run_file.entry_point is not None
    spec = run_file.spec
    sys.argv = [run_file.entry_point, *spec.argv, *(as_flag(name, value) for name, value in spec.arguments.items())]
    sys.path.insert(0, str(Path(run_file.entry_point).parent))
    try:
        runpy.run_path(run_file.entry_point, run_name="__main__")
    except SystemExit as exc:
        if exc.code not in (None, 0):
            raise TrainingFailed(f"the script exited with {exc.code}; its log says why") from exc


def _imported(entry_point: str) -> Callable[[RunFile, SpoolWriter], None]:
    module_name, _, function_name = entry_point.partition(":")
    try:
        function: Callable[[RunFile, SpoolWriter], None] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as exc:
        raise InvalidInput(f"the entry point {entry_point!r} cannot be imported: {exc}") from exc
    return function


def leave(status: int) -> NoReturn:
    """End the process as the interpreter does, but do not take it apart.

    Threads of a process group that a user script still holds go on meanwhile, and objects that they share with the main
    one are destroyed in no order: such a rank is aborted now and then (SIGABRT) after all its work, and has failed
    for torchrun.
    """
    wait_for_threads: Callable[[], None] = threading._shutdown  # type: ignore[attr-defined]  # typeshed lacks it
    wait_for_threads()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
