"""When a worker counts as alive. The one rule, for whoever asks."""

from apt_jobs.settings import Settings

ALIVE_HEARTBEATS = 3  # a worker that missed so many is gone


def alive_within_s(settings: Settings) -> float:
    """Return the age in seconds up to which a heartbeat says that its worker lives."""
    return ALIVE_HEARTBEATS * settings.heartbeat_s


def node_alive_within_s(settings: Settings) -> float:
    """Return the same for a node whose ranks take part in a running attempt: the attempt's lease.

    The head ends an attempt for a lost node. As long as the lease outlasts a silent database, so do the nodes.
    """
    return max(settings.lease_s, alive_within_s(settings))
