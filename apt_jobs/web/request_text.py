"""What no address of ours contains: control characters, and bytes that are not UTF-8.

Checked once for all routes, so that no filter, path or query parameter brings them to the database.
"""

import re
from urllib.parse import unquote_to_bytes

from starlette.types import Scope

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SUSPECT = re.compile(rb"[%\x00-\x1f\x7f-\xff]")
MAX_SHOWN_CHARS = 60


def fault_in_address(scope: Scope) -> tuple[int, str] | None:
    """Return the status for a request whose path or query is wrong, and what is; None: nothing."""
    raw_path: bytes = scope.get("raw_path") or b""
    query: bytes = scope.get("query_string") or b""
    if _SUSPECT.search(raw_path) and (fault := _fault(raw_path)) is not None:
        return 400, f"the path {fault}"
    if _SUSPECT.search(query):
        for part in query.replace(b"+", b" ").split(b"&"):
            name, _, value = part.partition(b"=")
            if (fault := _fault(name)) is not None:
                return 422, f"the name of a query parameter {fault}"
            if (fault := _fault(value)) is not None:
                shown = unquote_to_bytes(name).decode()[:MAX_SHOWN_CHARS]
                return 422, f"the query parameter {shown!r} {fault}"
    return None


def _fault(encoded: bytes) -> str | None:
    raw = unquote_to_bytes(encoded)
    try:
        text = raw.decode()
    except UnicodeDecodeError as exc:
        return f"is not UTF-8 at byte {exc.start} ({raw[exc.start]:#04x}); encode text as UTF-8, then percent-encode it"
    if (found := _CONTROL.search(text)) is not None:
        return f"has the control character U+{ord(found[0]):04X} at character {found.start()}; send printable text"
    return None
