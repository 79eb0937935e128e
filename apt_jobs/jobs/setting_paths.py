"""Settings of jobs by dotted path, and those in which jobs differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

MAX_SETTINGS = 200  # of a comparison
MAX_CHARS = 200  # of one value that is shown
_NOT_SETTINGS = ("name",)  # it is shown beside them


def setting_paths(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a spec by path, as `training.learning_rate`. A list is one setting."""
    return {path: value for path, value in _paths(spec, "") if path not in _NOT_SETTINGS}


def differing_settings(specs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], int]:
    """Return the settings in which specs differ, by path, and how many more there are than `MAX_SETTINGS`.

    A value is that of each spec, in order; None: it has no such setting. Long ones are cut.
    """
    by_path = [setting_paths(spec) for spec in specs]
    paths = dict.fromkeys(path for own in by_path for path in own)
    differing = [path for path in paths if len({_as_key(own, path) for own in by_path}) > 1]
    shown = {path: [_shown(own.get(path)) for own in by_path] for path in differing[:MAX_SETTINGS]}
    return shown, len(differing) - len(shown)


def _paths(node: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{path}.")
        else:
            yield path, value


def _as_key(own: Mapping[str, Any], path: str) -> bytes:
    value = own.get(path)
    # 1 and 1.0 are the same number, but true is another value than 1
    return orjson.dumps(float(value) if type(value) is int and abs(value) < 2**53 else value)


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_CHARS else f"{value[: MAX_CHARS - 1]}…"
    if isinstance(value, list | Mapping):
        return _shown(orjson.dumps(value).decode())
    return value
