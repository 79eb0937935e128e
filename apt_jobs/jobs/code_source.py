"""The code that a job brings: a packed folder by its hash, or a commit of git."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from apt_jobs.git_hosts import split_git_url
from apt_jobs.jobs.code import Sha256
from apt_jobs.jobs.strict_model import Strict


def _require_address(url: str) -> str:
    """Refuse what is no plain address of a repository, or has a password."""
    parts = split_git_url(url)
    if parts is None:
        raise ValueError(
            f"{url[:200]!r} is no address of a repository; write https://host/path.git or ssh://git@host/path"
        )
    if parts.password is not None or (parts.username is not None and parts.scheme != "ssh"):
        raise ValueError(
            "an address has no user or password, which all who read the job would see; the operator gives git its own"
        )
    return url


class GitCode(Strict):
    """One commit of a repository."""

    url: Annotated[str, StringConstraints(max_length=1_000), AfterValidator(_require_address)] = Field(
        description="As `https://host/path.git`, of a host that the operator lists in APT_JOBS_GIT_HOSTS."
    )
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] = Field(
        description="Whole name of a commit, 40 digits and letters: a branch would be other code another day."
    )


class Code(Strict):
    """The code that a job brings, whose command `argv` is: a packed folder, or a commit of git."""

    sha256: Sha256 | None = Field(
        None, description="Of the packed folder, uploaded by `PUT /api/code/{sha256}` (`apt-jobs run`)."
    )
    git: GitCode | None = Field(None, description="A commit that the worker fetches.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.sha256 is None) == (self.git is None):
            raise ValueError("code is either sha256, of a packed folder, or git, a commit")
        return self
