"""Make fewer events for overviews: what repeats is folded into its last one, with the extremes of those before it.

Only kinds that are declared so are folded. An anomaly, a state, a checkpoint is never dropped, merged or delayed.
"""

from typing import Any

from apt_jobs.events.kinds import EVENT_TYPES

FOLDED = frozenset(cls.kind for cls in EVENT_TYPES if cls.is_folded)
_NAMES = frozenset({"NaN", "Infinity", "-Infinity"})  # of floats that JSON does not have
_PLACE = frozenset({"seq", "attempt", "step", "epoch", "num_rollbacks", "anomalous", "message"})  # have no extremes


class Conflation:
    """Fold events, in their JSON form; `pop` returns what is left of them."""

    def __init__(self) -> None:
        self._kept: list[dict[str, Any]] = []
        self._last: dict[str, dict[str, Any]] = {}

    def add(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind not in FOLDED:
            self._kept.append(event)
        elif (before := self._last.get(kind)) is None:
            self._last[kind] = event
        else:
            self._last[kind] = _folded(before, event)

    def pop(self) -> list[dict[str, Any]]:
        """Remove and return all since the last call, in order of `seq`."""
        events = sorted([*self._kept, *self._last.values()], key=lambda event: int(event["seq"]))
        self._kept, self._last = [], {}
        return events


def _folded(before: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    known = before.get("conflated") or {"count": 1, "first_seq": before["seq"], "min": before, "max": before}
    folded = dict(event)
    if "anomalous" in event:
        folded["anomalous"] = sorted({*before["anomalous"], *event["anomalous"]})
    folded["conflated"] = {
        "count": known["count"] + 1,
        "first_seq": known["first_seq"],
        "min": _extremes(known["min"], event, min),
        "max": _extremes(known["max"], event, max),
    }
    return folded


def _extremes(known: dict[str, Any], event: dict[str, Any], choose: Any) -> dict[str, Any]:
    return {
        name: _extreme(known[name], value, choose)
        for name, value in event.items()
        if name in known and name not in _PLACE and _is_numeric(value)
    }


def _extreme(known: Any, value: Any, choose: Any) -> Any:
    if isinstance(value, list):
        return (
            [_extreme(*pair, choose) for pair in zip(known, value, strict=True)] if len(known) == len(value) else value
        )
    if isinstance(known, str):  # NaN and the infinities travel as names: a number says more
        return value
    return known if isinstance(value, str) else choose(known, value)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_numeric, value))
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in _NAMES
