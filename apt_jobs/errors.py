"""Every error that this package raises on purpose.

AptJobsError
├── InvalidInput             wrong input from outside; the message names value, expectation and remedy
│   ├── InvalidDataset       a data set that cannot be trained on
│   ├── InvalidCheckpoint    a checkpoint that is damaged, foreign or not there
│   └── InvalidReferences    a job that names what does not exist
├── NotFound                 no such job, checkpoint, model, data set or key
│   └── LostBase             an adapter whose base model was moved or deleted
├── Conflict                 the thing exists, but its state forbids the request
│   ├── TransitionRefused    the transition table does not allow this change of state
│   ├── IdempotencyMismatch  an Idempotency-Key was used again with another body
│   └── AlreadyRunning       a second `apt-jobs up` on one data directory, or a port in use
├── Denied                   no key, a wrong one, or a role that may not do this
├── Fenced                   this attempt no longer owns its job: stop, write nothing more
├── Unavailable              a part that is needed does not answer (broker, database, worker)
├── WorkerLacks              this worker lacks what the job needs: hand the job back
├── OutOfSpace               the disk cannot hold what must be written
└── TrainingFailed           the training process ended without success
"""

from collections.abc import Sequence


class AptJobsError(Exception):
    """Root of the tree above. `str(error)` is a sentence for the user."""


class InvalidInput(AptJobsError):
    """Wrong input from outside."""


class InvalidDataset(InvalidInput):
    """The data set is empty, binary, unknown or too short."""


class InvalidCheckpoint(InvalidInput):
    """The checkpoint is damaged, foreign or missing."""


class InvalidReferences(InvalidInput):
    """A job names a data set, model or entry point that does not exist; `faults` has one entry for each field."""

    def __init__(self, message: str, faults: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.faults = list(faults)


class NotFound(AptJobsError):
    """The thing named in the request does not exist."""


class LostBase(NotFound):
    """The base model of an adapter was moved or deleted."""

    def __init__(self, model_id: str, base_model: str) -> None:
        super().__init__(
            f"model {model_id} is an adapter of the base model {base_model!r}, which was moved or deleted; "
            "bring it back under that name"
        )
        self.base_model = base_model


class Conflict(AptJobsError):
    """The state of the thing forbids the request."""


class TransitionRefused(Conflict):
    """The transition table does not allow this change of state."""


class IdempotencyMismatch(Conflict):
    """An Idempotency-Key was used again with another body."""


class AlreadyRunning(Conflict):
    """Another process holds the data directory or the port."""


class Denied(AptJobsError):
    """Not authenticated, or not allowed."""


class Fenced(AptJobsError):
    """The attempt lost its lease; whoever catches this stops writing and ends its process tree."""


class Unavailable(AptJobsError):
    """A needed part does not answer."""


class WorkerLacks(AptJobsError):
    """This worker lacks what a job needs: no fault of the job, another worker may have it."""


class OutOfSpace(AptJobsError):
    """Too little disk space is left."""


class TrainingFailed(AptJobsError):
    """The training process ended without success; the message carries the first rank's reason."""
