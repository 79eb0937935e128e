"""Addresses of git repositories: which are plain, and which are below what the operator lists."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self
from urllib.parse import SplitResult, urlsplit

SCHEMES = ("https", "http", "ssh", "file")
_ADDRESS = re.compile(r"[A-Za-z0-9._~:/@+%-]+")  # no space, query, fragment, option or control character
_SEGMENT = re.compile(r"[A-Za-z0-9._~+-]+")


@dataclass(frozen=True, slots=True)
class GitHost:
    """Where the operator lets jobs fetch from: a host by one protocol, or a part of it."""

    scheme: str
    authority: str  # host and port; of ssh with the user
    folder: str  # which a path begins with: "" or "/team"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `github.com` (by https), `github.com/team`, `ssh://git@host`, `http://127.0.0.1:8080`, `file:///srv/git`.

        Raises:
            ValueError: it is none of these.
        """
        parts = split_git_url(text if "://" in text else f"https://{text}", may_be_host=True)
        if parts is None or parts.password is not None or (parts.scheme == "file" and not parts.path.strip("/")):
            raise ValueError(
                f"{text!r} is no host of git; write github.com, github.com/team, ssh://git@host or file:///srv/git"
            )
        return cls(parts.scheme, parts.netloc.lower(), parts.path.rstrip("/"))

    def includes(self, url: str) -> bool:
        """Return whether an address of a job is below this one."""
        parts = split_git_url(url)
        if parts is None or (parts.scheme, parts.netloc.lower()) != (self.scheme, self.authority):
            return False
        return parts.path.startswith(f"{self.folder}/") and parts.path != f"{self.folder}/"


def host_of(url: str, hosts: Iterable[str]) -> GitHost | None:
    """Return the first of the operator's hosts that an address is below; None: none of them."""
    return next((host for text in hosts if (host := GitHost.parse(text)).includes(url)), None)


def split_git_url(url: str, *, may_be_host: bool = False) -> SplitResult | None:
    """Return the parts of a plain address, None of another: no segment leads up, or could be read as an option."""
    try:
        parts = urlsplit(url)
        if not _ADDRESS.fullmatch(url) or parts.scheme not in SCHEMES or (parts.port == 0):
            return None
    except ValueError:
        return None
    segments = parts.path.strip("/").split("/")
    is_empty = segments == [""]
    if (is_empty and not may_be_host) or bool(parts.netloc) == (parts.scheme == "file"):
        return None
    if parts.netloc.startswith("-") or (parts.hostname or "x").startswith("-"):
        return None
    if not is_empty and any(
        not _SEGMENT.fullmatch(part) or part in (".", "..") or part.startswith("-") for part in segments
    ):
        return None
    return parts
