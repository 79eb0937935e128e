"""Answers that fit into an agent's context: whatever a job printed or logged, no answer is longer than a few pages."""

import json
from typing import Any

MAX_CHARS = 20_000
_STEPS = ((2_000, 200), (500, 100), (200, 40), (100, 10))  # longest text, most items of a list or object
_MAX_DEPTH = 12


def bounded(answer: dict[str, Any], max_chars: int = MAX_CHARS) -> dict[str, Any]:
    """Return an answer whose JSON has at most `max_chars` characters; `is_cut` says that something is left out."""
    if _size(answer) <= max_chars:
        return answer
    for max_text, max_items in _STEPS:
        cut = {**_cut(answer, max_text, max_items, 0), "is_cut": True}
        if _size(cut) <= max_chars:
            return cut
    return {"is_cut": True, "beginning": json.dumps(answer, default=str)[: max_chars // 2]}


def _size(value: Any) -> int:
    return len(json.dumps(value, default=str))


def _cut(value: Any, max_text: int, max_items: int, depth: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= max_text else f"{value[:max_text]}... ({len(value):,} characters)"
    if depth > _MAX_DEPTH and isinstance(value, dict | list):
        return "..."
    if isinstance(value, dict):
        kept = list(value.items())[:max_items]
        return {key: _cut(item, max_text, max_items, depth + 1) for key, item in kept}
    if isinstance(value, list):
        return [_cut(item, max_text, max_items, depth + 1) for item in value[:max_items]]
    return value
