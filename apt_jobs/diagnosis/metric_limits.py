"""Bounds of the metrics that user scripts log, wherever the lines come from: names, and how many steps are stored.

`run/metric_values.py` says the same to a Python script; other languages write the lines themselves.
"""

from collections.abc import Iterator

from apt_jobs.events.kinds import Event, LineLogged, MetricsLogged
from apt_jobs.jobs.printable import first_unprintable
from apt_jobs.run.metric_values import MAX_NAME_CHARS, MAX_NAMES, MAX_STEP

EVENTS_BEFORE_DOWNSAMPLING = 100_000  # of the same names: then every second, after as many again every third, ...
MAX_NAME_SETS = 1_000  # that are counted apart


class MetricLimits:
    """Of one attempt, over all its ranks."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._num_events: dict[int, int] = {}  # by the hash of their names
        self._warned: set[str] = set()

    def limited(self, event: MetricsLogged) -> Iterator[Event]:
        """Yield what is to be stored of `event`, and a warning when something is left out for the first time."""
        if not 0 <= event.step <= MAX_STEP or event.rank < 0:
            yield from self._warning("step", f"metrics of step {event.step} are left out: a step is from 0 to 2**53")
            return
        values = event.values
        if not values.keys() <= self._names:
            values = {name: value for name, value in values.items() if self._is_known(name)}
            if len(values) < len(event.values):
                message = (
                    f"a job has at most {MAX_NAMES} metrics with printable names of 1 to {MAX_NAME_CHARS} characters"
                )
                yield from self._warning("names", f"{message}; others are left out")
        if not values:
            return
        if self._is_left_out(frozenset(values)):
            yield from self._warning(
                "events", f"more than {EVENTS_BEFORE_DOWNSAMPLING:,} steps of metrics: now not each is kept"
            )
            return
        yield event if len(values) == len(event.values) else MetricsLogged(event.step, event.rank, values)

    def _is_known(self, name: str) -> bool:
        if name in self._names:
            return True
        if not 0 < len(name) <= MAX_NAME_CHARS or first_unprintable(name) is not None or len(self._names) >= MAX_NAMES:
            return False
        self._names.add(name)
        return True

    def _is_left_out(self, names: frozenset[str]) -> bool:
        key = hash(names)
        if key not in self._num_events and len(self._num_events) >= MAX_NAME_SETS:
            key = 0
        number = self._num_events[key] = self._num_events.get(key, 0) + 1
        return number % (1 + number // EVENTS_BEFORE_DOWNSAMPLING) != 0

    def _warning(self, key: str, message: str) -> Iterator[Event]:
        if key not in self._warned:
            self._warned.add(key)
            yield LineLogged("warning", "supervisor", message)
