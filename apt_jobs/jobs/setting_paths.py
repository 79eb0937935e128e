"""Settings of jobs by dotted path, and those in which jobs differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

MAX_SETTINGS = 200  # of a comparison
MAX_CHARS = 200  # of one value that is shown
_NOT_SETTINGS = ("name",)  # it is shown beside them


def differing_settings(specs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], int]:
    """Return the settings in which specs differ, by path, and how many more there are than `MAX_SETTINGS`.

    A value is that of each spec, in order; None: it has no such setting. A list is one setting. Long values are cut.
    """
    differing = {path: values for path, values in _differing(specs, "") if path not in _NOT_SETTINGS}
    shown = dict(list(differing.items())[:MAX_SETTINGS])
    return {path: [_shown(value) for value in values] for path, values in shown.items()}, len(differing) - len(shown)


def _differing(nodes: Sequence[Mapping[str, Any]], above: str) -> Iterator[tuple[str, list[Any]]]:
    """Yield what differs; an object that is the same in all nodes, as most are, is not looked into."""
    for name in dict.fromkeys(name for node in nodes for name in node):
        values = [node.get(name) for node in nodes]
        if all(value == values[0] for value in values):
            continue
        inner = [value if isinstance(value, Mapping) else {} for value in values]
        yield from _differing(inner, f"{above}{name}.")
        others = [None if isinstance(value, Mapping) else value for value in values]
        if any(value is not None for value in others):
            yield f"{above}{name}", others


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_CHARS else f"{value[: MAX_CHARS - 1]}…"
    if isinstance(value, list | Mapping):
        return _shown(orjson.dumps(value).decode())
    return value
