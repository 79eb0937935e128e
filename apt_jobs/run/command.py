"""Runs the command that a job brings: `python -m apt_jobs.run.command`, or a rank of torchrun.

The command is a child, so that it may be any program. This process waits for it and reports how it ended; it loads
neither torch nor the service.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from apt_jobs.jobs.handover import Handover, read_handover
from apt_jobs.jobs.outcome import Outcome, write_outcome
from apt_jobs.run.event_file import EventFile
from apt_jobs.run.parent import die_with_parent
from apt_jobs.run.stopping import STOPPED

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells exit
LOG_FOLDER = Path("torchrun", "node-0", "none", "attempt_0", "0")  # where torchrun would put those of rank 0


def run_command(rank: int) -> int:
    """Run the command of the run file to its end, in the job's own folder.

    Returns:
        Its exit status; of one that a signal killed 128 and the signal's number.

    Raises:
        RuntimeError: there is no run file, or no command in it.
    """
    handover = read_handover()
    if handover is None or not handover.command:
        raise RuntimeError("this process is for the command of a job, which APT_JOBS_RUN_FILE does not name")
    handover.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        process = subprocess.Popen(
            handover.command, cwd=handover.output_dir, stdin=subprocess.DEVNULL, preexec_fn=_die_with_this_process
        )
    except OSError as exc:
        what = f"the command {handover.command[0]!r} cannot be started: {exc.strerror}"
        status = NOT_FOUND if isinstance(exc, FileNotFoundError) else NOT_EXECUTABLE
        _report(handover, rank, status, what)
        return status
    signal.signal(signal.SIGTERM, _forwarder(process))
    status = process.wait()
    if status > 0:
        _report(handover, rank, status, f"the command exited with {status}; its log says why")
    elif status == 0 and rank == 0:
        has_stopped = (handover.run_dir / STOPPED).exists()
        write_outcome(handover.run_dir / "outcome", Outcome.STOPPED if has_stopped else Outcome.FINISHED)
    return status if status >= 0 else 128 - status  # killed: no fault that another attempt must repeat


def main() -> int:
    """Entry of the process that a job without torchrun has."""
    die_with_parent(signal.SIGKILL)
    handover = read_handover()
    if handover is not None:
        folder = handover.run_dir / LOG_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            fd = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            stream.flush()
            os.dup2(fd, stream.fileno())
            os.close(fd)
    return run_command(0)


def _forwarder(process: "subprocess.Popen[bytes]") -> "signal._HANDLER":
    def forward(_number: int, _frame: FrameType | None) -> None:
        process.send_signal(signal.SIGTERM)  # torchrun ends this process only

    return forward


def _die_with_this_process() -> None:
    die_with_parent(signal.SIGKILL)


def _report(handover: Handover, rank: int, status: int, message: str) -> None:
    events = EventFile(handover.spool_path(rank), f"rank {rank}", is_job=True)
    events.write(
        "failure",
        {"rank": rank, "error": "CommandFailed", "message": message, "traceback": "", "exit_status": status},
    )


if __name__ == "__main__":
    sys.exit(main())
