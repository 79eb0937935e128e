"""An event-driven job queue with a live monitor for training and running language models.

from apt_jobs import Client

with Client() as client:
    job = client.submit({"kind": "train", "num_ranks": 2})
    print(job.wait().state)

A training script has its job by `apt_jobs.current_run()`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt_jobs.client import AsyncClient, Client
    from apt_jobs.run.current import current_run

    __version__: str
__all__ = ["AsyncClient", "Client", "__version__", "current_run"]


def __getattr__(name: str) -> object:
    """Import what is asked for: ranks, workers and scripts import this package, too, and need little of it."""
    if name in ("AsyncClient", "Client"):
        from apt_jobs import client

        return getattr(client, name)
    if name == "current_run":
        from apt_jobs.run.current import current_run

        return current_run
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms, which a script need not wait for

    try:
        return version("apt-jobs")
    except PackageNotFoundError:  # a checkout that was not installed
        return "0.0.0"
