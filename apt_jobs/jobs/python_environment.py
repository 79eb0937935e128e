"""Which Python and packages a job runs with: built from what it lists, or registered by the operator.

A list names packages of the operator's index and nothing else. See docs/adr/0021-environments-of-jobs.md.
"""

import hashlib
import json
import re
import sysconfig
from typing import Annotated, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.code import require_name
from apt_jobs.jobs.strict_model import Strict

MAX_REQUIREMENTS = 500
MAX_LOCK_BYTES = 1 << 20
_REQUIREMENT = re.compile(
    r"""[A-Za-z0-9][A-Za-z0-9._-]*[ ]*(\[[A-Za-z0-9._, -]*\])?[ ]*[A-Za-z0-9 .,_*+!<>=~;'"()-]*"""
)
_ARCHIVE_SUFFIXES = (".whl", ".zip", ".gz", ".bz2", ".xz", ".tgz", ".tar")  # uv would take such a word for a file
_HASH = re.compile(r"--hash=[a-z0-9]+:[0-9a-fA-F]+")


def _require_package(text: str) -> str:
    """Refuse what is no package of an index: options, addresses, paths."""
    word = text.strip()
    if not _REQUIREMENT.fullmatch(word) or " -" in word or word.endswith(_ARCHIVE_SUFFIXES):
        raise ValueError(
            f"{word[:200]!r} is no package of an index; write a name and versions, as 'trl>=1.16' (options, addresses "
            "and paths are the operator's)"
        )
    return word


def _require_path(path: str) -> str:
    try:
        require_name(path)
    except InvalidInput as exc:
        raise ValueError(f"the lock is a file of the job's code: {exc}") from exc
    return path


Requirement = Annotated[str, StringConstraints(max_length=300), AfterValidator(_require_package)]
PythonVersion = Annotated[str, StringConstraints(pattern=r"^3\.(1[1-9]|[2-9][0-9])(\.[0-9]{1,2})?$")]


class PythonEnvironment(Strict):
    """The Python that a user script runs in: `requirements` or `lock`, built once for all jobs, or `name`."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = Field(
        None, description="An environment that the worker's operator registered, in APT_JOBS_ENVIRONMENTS."
    )
    python: PythonVersion | None = Field(
        None, description="Version, as `3.12`, from 3.11 on; null: that of the service."
    )
    requirements: list[Requirement] | None = Field(
        None, max_length=MAX_REQUIREMENTS, description="Packages, as `trl>=1.16`; resolved when it is first built."
    )
    lock: Annotated[str, StringConstraints(max_length=1_000), AfterValidator(_require_path)] | None = Field(
        None,
        description="A file of the job's code that pins every package, as `uv pip compile` or `pip freeze` write it.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("name", "requirements", "lock") if getattr(self, name) is not None]
        if len(given) != 1:
            seen = " and ".join(given) or "none of them"
            raise ValueError(f"an environment has either requirements, a lock or a name; got {seen}")
        if self.name is not None and self.python is not None:
            raise ValueError(f"the environment {self.name!r} has a Python of its own: leave python out")
        return self

    @property
    def is_built(self) -> bool:
        """Whether packages are installed for it, which runs code of theirs."""
        return self.name is None


def read_lock(content: bytes, name: str) -> str:
    """Return a lock that pins packages of the index.

    Raises:
        InvalidInput: it does something else; the message shows the line.
    """
    if len(content) > MAX_LOCK_BYTES:
        raise InvalidInput(f"the lock {name!r} is too large; at most {MAX_LOCK_BYTES:,} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as exc:
        raise InvalidInput(f"the lock {name!r} is no text in UTF-8") from exc
    lines = text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines()
    pins = [pin for number, line in enumerate(lines, 1) if (pin := _pin(line, f"line {number} of the lock {name!r}"))]
    if not pins:
        raise InvalidInput(f"the lock {name!r} pins no package; write it by: uv pip compile requirements.in -o {name}")
    return "\n".join(pins) + "\n"


def listed_packages(text: str) -> list[str]:
    """Return the lines of a file of requirements without comments; what they are is checked with the job."""
    lines = (_without_comment(line) for line in text.splitlines())
    return [line for line in lines if line]


def environment_hash(python: str, packages: str, *, is_lock: bool) -> str:
    """Return the name of an environment: equal ones are built once for each kind of machine."""
    parts = {"python": python, "packages": packages, "is_lock": is_lock, "platform": sysconfig.get_platform()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _pin(line: str, where: str) -> str:
    """Return one line of a lock without its comment."""
    words = _without_comment(line)
    without_hashes = _HASH.sub("", words).strip()
    if not words:
        return ""
    try:
        _require_package(without_hashes)
    except ValueError as exc:
        raise InvalidInput(f"{where}: {exc}") from exc
    if "==" not in without_hashes:
        raise InvalidInput(f"{where} does not pin a version: {without_hashes[:200]!r}; expected name==version")
    return words


def _without_comment(line: str) -> str:
    return re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
