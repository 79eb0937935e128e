"""Changes of a JSON document: RFC 7396 merge patches, and the `a.b=c` of command lines that make one."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from apt_jobs.errors import InvalidInput


def merge_patch(target: Any, patch: Any) -> Any:
    """Return `target` changed by `patch` (RFC 7396, section 2): null removes, objects are merged, all else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def patch_of(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the patch of `training.max_steps=10`; values are JSON, else text; `name=null` removes.

    Raises:
        InvalidInput: one is no assignment, or contradicts another.
    """
    patch: dict[str, Any] = {}
    for text in assignments:
        path, sign, value = text.partition("=")
        *folders, name = path.split(".")
        if not sign or not all([*folders, name]):
            raise InvalidInput(f"--set {text[:200]!r} is no name=value; write it as training.max_steps=10")
        place = patch
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise InvalidInput(f"--set {text[:200]!r} changes a part of what another --set replaces")
        place[name] = _value(value)
    return patch


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
