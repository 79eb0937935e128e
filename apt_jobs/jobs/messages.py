"""Sentences for whoever submitted a job: they name files, and do not tell where a server keeps them."""

import re

_QUOTED = re.compile(r"""(?P<quote>['"`])/(?:[^'"`\n]*/)?(?P<name>[^'"`/\n]*)/?(?P=quote)""")
_BARE = re.compile(r"(?<![\w./:'\"`~-])/(?:[\w.@+~%=,-]+/)+(?P<name>[\w.@+~%=-]*\w)/?")
_LOCAL_URL = re.compile(r"\b(?P<scheme>unix|file|sqlite(?:\+\w+)?):/{2,4}(?:[^\s'\"`/]*/)*")
_OF_SERVICE = re.compile(r"/(api|ws|v1|jobs|login|docs|assets|healthz|readyz|metrics|openapi\.json)(/|['\"`?]|$)")


def without_server_paths(text: str) -> str:
    """Return `text` with each absolute path of a file shortened to its last name; addresses of the service stay."""
    if "/" not in text:
        return text
    text = _LOCAL_URL.sub(lambda found: f"{found['scheme']}:", text)
    return _BARE.sub(_name_of, _QUOTED.sub(_quoted_name_of, text))


def _quoted_name_of(found: re.Match[str]) -> str:
    if _OF_SERVICE.match(found[0], 1):
        return found[0]
    return f"{found['quote']}{found['name'] or '...'}{found['quote']}"


def _name_of(found: re.Match[str]) -> str:
    return found[0] if _OF_SERVICE.match(found[0]) else found["name"]
