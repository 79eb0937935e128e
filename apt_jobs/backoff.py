"""The one doubling wait: how long to wait before something that failed is tried again."""

from dataclasses import dataclass

_MAX_DOUBLINGS = 60  # beyond it every wait is at its maximum, and a float does not overflow


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits of `first_s`, twice that, four times that ... at most `max_s` seconds."""

    first_s: float
    max_s: float

    def wait_s(self, num_failures: int) -> float:
        """Return the seconds to wait after so many failures in a row; the first is number 1."""
        doublings = min(max(num_failures - 1, 0), _MAX_DOUBLINGS)
        return float(min(self.first_s * 2.0**doublings, self.max_s))
