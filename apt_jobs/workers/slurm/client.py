"""Slurm's own commands, each with a time limit, and what they answer.

`squeue` is asked for columns, not for JSON: it filters these itself, and they are the same in every version.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from apt_jobs.errors import Unavailable, WorkerLacks

PENDING = frozenset(
    ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
)
OVER = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
        *("REVOKED", "TIMEOUT"),
    )
)
COLUMNS = "%i|%T|%S|%N|%j|%k|%r"
MAX_WORDS = 500  # of a command's error that are shown
_PASSED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
_PASSED_OF_SLURM = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS")
_JOB_ID = re.compile(r"^(\d+)(?:;\S+)?$", re.MULTILINE)  # as `sbatch --parsable` answers


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A row of `squeue`."""

    id: str
    state: str
    name: str
    owner: str  # its comment
    reason: str = ""  # why it is pending
    node: str = ""
    start_at: datetime | None = None  # or expected to

    @property
    def is_pending(self) -> bool:
        return self.state in PENDING

    @property
    def is_over(self) -> bool:
        return self.state in OVER


class SlurmClient:
    """Asks one cluster, as the user of this process."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: of each command but `sbatch`, which is waited for by who submits."""
        self._timeout_s = timeout_s

    def jobs(self, owner: str) -> list[SlurmJob]:
        """Return the jobs of a worker that Slurm knows, also those that ended in the last minutes.

        Raises:
            Unavailable: Slurm does not answer.
        """
        user = f"--user={os.getuid()}"
        lines = self._ask("squeue", "--noheader", "--states=all", user, f"--format={COLUMNS}").splitlines()
        return [job for line in lines if (job := read_row(line)) is not None and job.owner == owner]

    def cancel(self, job_ids: Sequence[str], signal: str | None = None) -> None:
        """End jobs, or only signal their steps.

        Raises:
            Unavailable: Slurm does not answer, or refuses.
        """
        if job_ids:
            self._ask("scancel", *([] if signal is None else [f"--signal={signal}"]), *job_ids)

    def nodes(self, partition: str | None) -> list[str]:
        """Return `number|cpus|MB|gres|up or down` of each kind of node of a partition, None: the default one.

        Raises:
            Unavailable: Slurm does not answer.
        """
        which = [] if partition is None else [f"--partition={partition}"]
        rows = [
            line.split("|", 1) for line in self._ask("sinfo", "-he", "--format=%P|%D|%c|%m|%G|%a", *which).splitlines()
        ]
        return [row[1] for row in rows if len(row) == 2 and (partition is not None or row[0].endswith("*"))]

    def submit(self, arguments: Sequence[str], script: str) -> "subprocess.Popen[str]":
        """Start `sbatch`. What it submits has none of this process's settings or secrets in its environment.

        Raises:
            WorkerLacks: there is no `sbatch` here.
        """
        try:
            process = subprocess.Popen(
                ["sbatch", *arguments],
                env=command_environment(os.environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(script)
        except BrokenPipeError:
            return process  # its status and words say why
        except OSError as exc:
            raise WorkerLacks(f"sbatch cannot be started on this machine: {exc.strerror}") from exc
        return process

    def _ask(self, *command: str) -> str:
        try:
            done = subprocess.run(
                command,
                env=command_environment(os.environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise Unavailable(f"{command[0]} did not answer within {self._timeout_s:g} s") from exc
        except OSError as exc:
            raise Unavailable(f"{command[0]} cannot be started on this machine: {exc.strerror}") from exc
        if done.returncode != 0:
            raise Unavailable(f"{command[0]} failed: {in_words(done.stderr or done.stdout)}")
        return done.stdout


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what Slurm's commands see: no setting of the service, and nothing of an allocation around this process."""
    passed = {name: environment[name] for name in (*_PASSED, *_PASSED_OF_SLURM) if name in environment}
    return {**passed, "SLURM_TIME_FORMAT": "%s"}


def read_row(line: str) -> SlurmJob | None:
    """Read a line in `COLUMNS`; None: it is none."""
    parts = line.split("|", COLUMNS.count("|"))
    if len(parts) != COLUMNS.count("|") + 1:
        return None
    job_id, state, start, node, name, owner, reason = (part.strip() for part in parts)
    start_at = datetime.fromtimestamp(int(start), UTC) if start.isdigit() and int(start) > 0 else None
    return SlurmJob(job_id, state, name, owner, reason, node, start_at)


def read_job_id(answer: str) -> str | None:
    """Return the id that `sbatch --parsable` printed; None: there is none."""
    found = _JOB_ID.search(answer)
    return None if found is None else found.group(1)


def in_words(output: str) -> str:
    """Return what a command said, in one line."""
    words = " ".join(output.split()) or "it said nothing"
    return words if len(words) <= MAX_WORDS else words[:MAX_WORDS] + "..."
