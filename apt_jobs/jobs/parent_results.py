"""Fields of a job that name a result of a job that it comes after, as `{{job.best_checkpoint}}`.

They are filled in when the last parent has ended, before the job may be claimed. With one parent `job` is that one; of
several, each is called by its id.
"""

import re
from collections.abc import Mapping
from typing import Any

RESULTS = ("id", "best_checkpoint", "last_checkpoint", "step", "train_loss", "best_val_loss")
FIELDS = ("base_model", "model", "arguments", "argv", "env")  # of a spec; prompts are left as they are
REFERENCE = re.compile(r"\{\{ ?(job(?:_[0-9a-z]{20})?)\.([a-z_]{1,40}) ?\}\}")


def references_in(spec: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return `(field, parent, result)` of each reference; `parent` is `job` or an id."""
    return [
        (field, found[1], found[2])
        for field in FIELDS
        for text in _texts_of(spec.get(field))
        for found in REFERENCE.finditer(text)
    ]


def filled_in(spec: Mapping[str, Any], results: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """Return the spec with each reference replaced: a text that is nothing else becomes the value itself."""
    return {field: _filled(value, results) if field in FIELDS else value for field, value in spec.items()}


def _filled(value: Any, results: Mapping[tuple[str, str], Any]) -> Any:
    if isinstance(value, str):
        if whole := REFERENCE.fullmatch(value):
            return results[whole[1], whole[2]]
        return REFERENCE.sub(lambda found: str(results[found[1], found[2]]), value)
    if isinstance(value, list):
        return [_filled(item, results) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, results) for key, item in value.items()}
    return value


def _texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in _texts_of(item)]
