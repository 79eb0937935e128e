"""Which names and values a metric may have: what is refused is said once, and the rest of the call is kept."""

import math
from collections.abc import Mapping
from typing import Any

from apt_jobs.jobs.printable import escaped, first_unprintable
from apt_jobs.run.event_file import EventFile, json_number

MAX_NAMES = 500  # of a job; as `diagnosis/metric_limits.py` enforces it
MAX_NAME_CHARS = 200
MAX_STEP = 2**53  # beyond it a browser cannot tell steps apart
Number = int | float


class MetricValues:
    """The names of one process, and the checks of what it logs."""

    def __init__(self, events: EventFile) -> None:
        self._events = events
        self._names: set[str] = set()

    def checked(self, values: object) -> dict[str, Number | str]:
        """Return the values that can be stored, by name, as JSON has them."""
        if not isinstance(values, Mapping):
            self._events.complain("mapping", f"log() takes a dict of numbers by name, not {_shown(values)}")
            return {}
        kept: dict[str, Number | str] = {}
        for name, value in values.items():
            if name in self._names or self._is_name(name):
                number = self._number(name, value)
                if number is not None:
                    kept[name] = json_number(number)
        return kept

    def is_media_name(self, name: object) -> bool:
        """Return whether an image or a table may be called so."""
        if isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and first_unprintable(name) is None:
            return True
        self._events.complain(
            "media name", f"a name is 1 to {MAX_NAME_CHARS} printable characters, not {_shown(name)}; it is left out"
        )
        return False

    def step(self, step: object) -> int | None:
        """Return the step as an integer; None if it is none."""
        number = plain_number(step)
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if isinstance(number, int) and 0 <= number <= MAX_STEP:
            return number
        self._events.complain("step", f"a step is an integer from 0 to 2**53, not {_shown(step)}; the next one counts")
        return None

    def _is_name(self, name: object) -> bool:
        if not isinstance(name, str) or not name or len(name) > MAX_NAME_CHARS:
            self._events.complain(
                "name", f"the name of a metric is a string of 1 to {MAX_NAME_CHARS} characters, not {_shown(name)}"
            )
            return False
        if first_unprintable(name) is not None:
            self._events.complain(
                f"name {name}", f"metric {escaped(name)!r} has a character that is not printable; it is left out"
            )
            return False
        if len(self._names) >= MAX_NAMES:
            self._events.complain(
                "names", f"a job has at most {MAX_NAMES} metrics; {name!r} and later ones are left out"
            )
            return False
        self._names.add(name)
        return True

    def _number(self, name: str, value: object) -> Number | None:
        number = plain_number(value)
        if number is None:
            self._events.complain(
                f"value {name}", f"metric {name!r} takes a number, not {_shown(value)}; it is left out"
            )
        return number


def plain_number(value: Any) -> Number | None:
    """Return a Python number: of NumPy and torch scalars their value; None: it is no number."""
    if type(value) is float or (type(value) is int and abs(value) < 2**63):
        number: Number = value
        return number
    if isinstance(value, str | bytes | complex):
        return None
    try:
        if hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0:
            whole = value.__index__()
            return whole if abs(whole) < 2**63 else float(whole)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass  # a float tensor has the method, and raises
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception:  # whatever `__float__` of somebody's class raises is no reason to end a training
        return None


def _shown(value: object) -> str:
    try:
        text = escaped(repr(value)[:100])
    except Exception:  # the same of `__repr__`
        text = "?"
    return f"{type(value).__name__} {text}"
