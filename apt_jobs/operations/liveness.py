"""When a worker counts as alive. The one rule, for whoever asks."""

from apt_jobs.settings import Settings

ALIVE_HEARTBEATS = 3  # a worker that missed so many is gone


def alive_within_s(settings: Settings) -> float:
    """Return the age in seconds up to which a heartbeat says that its worker lives."""
    return ALIVE_HEARTBEATS * settings.heartbeat_s
