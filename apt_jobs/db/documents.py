"""What a column can hold: JSON documents and texts of any origin, the same on both dialects.

A model may generate a NUL character, an exception may quote a file name that is no UTF-8, a broken training has a loss
of NaN. None of these may keep a job from ending.
"""

import json
from typing import Any

from sqlalchemy import JSON, Dialect, String, TypeDecorator
from sqlalchemy.dialects.postgresql import JSONB

from apt_jobs.events.codec import finite_or_name

DOCUMENT = JSON(none_as_null=True)  # on Postgres `json`, which keeps a NUL character; `jsonb` refuses it
LABELS = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class Words(TypeDecorator[str]):
    """Text of any origin; see `storable_text`."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable_text(value)


def storable_text(text: str) -> str:
    """`text` with `?` for what Postgres or UTF-8 cannot hold: NUL and lone surrogates."""
    return text.replace("\0", "?").encode("utf-8", "replace").decode("utf-8")


def encode_document(value: Any) -> str:
    """Return JSON that every reader takes: a float that is not finite becomes its name, a lone surrogate `?`."""
    return json.dumps(_plain(value), ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return finite_or_name(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
