"""Every rule of trying again: whose fault ended an attempt, how often that may happen, how long to wait.

Faults of the job and faults of the infrastructure are counted apart. What a worker lacks is neither: the job is handed
back and kept off that worker for a while.
"""

from dataclasses import dataclass
from enum import StrEnum

from apt_jobs.backoff import Backoff
from apt_jobs.settings import Settings


class Fault(StrEnum):
    """Whose fault ended an attempt that did not end by itself."""

    JOB = "job"  # a rank died or hung: the next attempt may do the same
    INFRASTRUCTURE = "infrastructure"  # a worker, a machine, a network or the database was lost


RETRY = Backoff(5.0, 300.0)
HAND_BACK = Backoff(30.0, 600.0)
IMPORT_WORKER = "import"  # owner of the attempt of `apt-jobs import`
WORKER_PAUSE = Backoff(60.0, 600.0)


@dataclass(frozen=True, slots=True)
class RetryRules:
    """The settings that decide. The defaults are those of `Settings`."""

    max_job_faults_without_checkpoint: int = 3  # in a row: the job is poison
    max_infrastructure_faults: int = 10  # in a row, without a new checkpoint
    retry: Backoff = RETRY  # before the next attempt
    hand_back: Backoff = HAND_BACK  # before a job is offered again to a worker that handed it back
    max_hand_backs: int = 3  # in a row by one worker: it stops claiming
    worker_pause: Backoff = WORKER_PAUSE  # before such a worker tries one job again


@dataclass(frozen=True, slots=True)
class FaultCounts:
    """What the row of a job counts."""

    num_job_faults: int  # since it was submitted or retried by a user
    num_job_faults_without_checkpoint: int  # in a row
    num_infrastructure_faults: int  # in a row, without a new checkpoint

    def plus(self, fault: Fault) -> "FaultCounts":
        """Return the counts after one more fault."""
        is_job = fault is Fault.JOB
        return FaultCounts(
            self.num_job_faults + is_job,
            self.num_job_faults_without_checkpoint + is_job,
            self.num_infrastructure_faults + (not is_job),
        )


def retry_rules(settings: Settings) -> RetryRules:
    """Return the rules of a process's settings."""
    return RetryRules(
        max_job_faults_without_checkpoint=settings.max_job_faults_without_checkpoint,
        max_infrastructure_faults=settings.max_infrastructure_faults,
        retry=Backoff(settings.retry_wait_s, settings.retry_wait_max_s),
        hand_back=Backoff(settings.hand_back_wait_s, settings.hand_back_wait_max_s),
        max_hand_backs=settings.max_hand_backs,
        worker_pause=Backoff(2 * settings.hand_back_wait_s, settings.hand_back_wait_max_s),
    )


def fault_of_lost_worker(worker: str | None) -> Fault:
    """Return what it counts as that a worker was lost: a fault of the infrastructure, but for an import that broke off.

    Nobody else can go on with an import, which is a command that reads files of its own machine.
    """
    return Fault.JOB if worker == IMPORT_WORKER else Fault.INFRASTRUCTURE


def why_give_up(counts: FaultCounts, fault: Fault, max_attempts: int, rules: RetryRules) -> str | None:
    """Return why a job is given up after `fault`, which `counts` includes; None: it is tried again."""
    if fault is Fault.INFRASTRUCTURE:
        if counts.num_infrastructure_faults < rules.max_infrastructure_faults:
            return None
        return f"{counts.num_infrastructure_faults} infrastructure faults in a row without a new checkpoint"
    if counts.num_job_faults_without_checkpoint >= rules.max_job_faults_without_checkpoint:
        return f"{counts.num_job_faults_without_checkpoint} in a row without a new checkpoint"
    if counts.num_job_faults >= max_attempts:
        return f"{counts.num_job_faults} of at most {max_attempts} attempts ended by the job's own fault"
    return None


def retry_wait_s(counts: FaultCounts, fault: Fault, rules: RetryRules) -> float:
    """Return the seconds before the next attempt after `fault`, which `counts` includes."""
    is_job = fault is Fault.JOB
    return rules.retry.wait_s(counts.num_job_faults_without_checkpoint if is_job else counts.num_infrastructure_faults)
