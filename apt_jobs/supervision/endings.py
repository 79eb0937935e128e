"""Why an attempt is ended before its time, how its ranks are told, and what its exit status says."""

import enum
import signal

from apt_jobs.jobs.run_file import RunFile


class Ending(enum.Enum):
    """Why the supervisor ended the tree, or asked the ranks to; none of them: it ended by itself."""

    CANCELLED = "cancelled by a user"
    PAUSED = "paused by a user"
    PREEMPTED = "preempted by a job of higher priority"
    DRAINED = "the worker was drained"
    ALLOCATION_ENDS = "Slurm ends its allocation"
    TIME_LIMIT = "the job's time limit was reached"
    WORKER_GONE = "the worker was lost"
    NODE_LOST = "a node was lost"
    STALLED = "no event or output for stall_timeout_s; the ranks are considered hung"
    FENCED = "the lease was lost"


def write_stop_file(run_file: RunFile, reason: Ending) -> None:
    """Ask the ranks to save and stop. The file appears whole: a user's script shows what is in it."""
    temporary = run_file.stop_path.with_name(".stop")
    temporary.write_text(reason.value)
    temporary.rename(run_file.stop_path)


def exit_in_words(status: int | None) -> str:
    """Say what became of torchrun, from its exit status; None or 0: it left without a word."""
    if status is None or status == 0:
        return "the training ended without saying how"
    if status < 0:
        return f"torchrun was killed by {signal.Signals(-status).name}"
    return (
        "a rank was killed or ended without a word (out of memory, if it was SIGKILL); its last lines are in the error"
    )
