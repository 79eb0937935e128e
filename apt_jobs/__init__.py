"""An event-driven job queue with a live monitor for training and running language models.

from apt_jobs import Client

with Client() as client:
    job = client.submit({"kind": "train", "num_ranks": 2})
    print(job.wait().state)
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt_jobs.client import AsyncClient, Client

try:
    __version__ = version("apt-jobs")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0.0.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    """Import the clients when they are asked for: ranks and workers import this package, too, and need neither."""
    if name in ("AsyncClient", "Client"):
        from apt_jobs import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
