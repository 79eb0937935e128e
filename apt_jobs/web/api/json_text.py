"""JSON as every reader understands it: strict, shallow, UTF-8, and each key of an object once."""

import codecs
import json
import re
from collections.abc import Sequence
from typing import NoReturn

import orjson

from apt_jobs.web.problems import ProblemError

MAX_DEPTH = 32  # of brackets
MAX_KEY_CHARS = 60  # of a key that is shown
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_ROUND = bytes.maketrans(b"[{]}", b"(())")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_OTHER_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def checked_json(raw: bytes) -> bytes:
    """Return a document without its byte order mark, if it is one.

    Raises:
        ProblemError: 400, it is empty, in another encoding, no JSON (NaN and Infinity are none), nests too deep, or has
            a key twice, of which two readers would choose differently.
    """
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise ProblemError(400, "the body is empty; send a JSON object")
    if raw.startswith(_OTHER_MARKS):
        raise ProblemError(400, "the body begins with a byte order mark of UTF-16 or UTF-32; send JSON in UTF-8")
    try:
        orjson.loads(raw)  # strict: no NaN, no Infinity, no half documents, at most 1,024 levels
    except orjson.JSONDecodeError as exc:
        raise ProblemError(400, f"the body is not JSON: {exc}") from exc
    if nests_deeper(raw, MAX_DEPTH):
        raise ProblemError(400, f"the body nests deeper than {MAX_DEPTH} levels")
    # Numbers stay text: a long one is for the validation to refuse.
    json.loads(raw, object_pairs_hook=_require_single_keys, parse_int=str, parse_float=str, parse_constant=_refuse)
    return raw


def nests_deeper(document: bytes, levels: int) -> bool:
    """Return whether a JSON document nests deeper: each round takes the innermost brackets away, at the speed of C."""
    brackets = _STRING.sub(b"", document).translate(_ROUND, _NO_BRACKETS)
    for _ in range(levels):
        brackets = brackets.replace(b"()", b"")
    return bool(brackets)


def _require_single_keys(pairs: Sequence[tuple[str, object]]) -> None:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ProblemError(400, f"the key {twice[:MAX_KEY_CHARS]!r} is in one object twice; send each key once")


def _refuse(name: str) -> NoReturn:
    raise ProblemError(400, f"the body is not JSON: {name} is no number; leave it out, or send null or a string")
