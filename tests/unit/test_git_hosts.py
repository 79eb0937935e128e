"""Which addresses of repositories a job may name, and which of them the operator's list includes."""

import pytest
from pydantic import ValidationError

from apt_jobs.git_hosts import GitHost, host_of
from apt_jobs.jobs.code_source import Code, GitCode
from apt_jobs.settings import Settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTS = ("git.example", "other.example/team", "ssh://git@git.example", "http://127.0.0.1:8080", "file:///srv/git")


@pytest.mark.parametrize(
    ("url", "is_listed"),
    [
        ("https://git.example/a/b.git", True),
        ("https://GIT.example/a", True),
        ("https://other.example/team/a", True),
        ("ssh://git@git.example/a.git", True),
        ("http://127.0.0.1:8080/a", True),
        ("file:///srv/git/a.git", True),
        ("http://git.example/a/b.git", False),
        ("https://git.example:8443/a", False),
        ("https://git.example.evil.example/a", False),
        ("https://evil.example/git.example/a", False),
        ("https://other.example/teams/a", False),
        ("https://other.example/team", False),
        ("https://other.example/other/team/a", False),
        ("ssh://root@git.example/a.git", False),
        ("ssh://git.example/a.git", False),
        ("http://127.0.0.1/a", False),
        ("file:///srv/gitea/a.git", False),
        ("file:///srv/git", False),
        ("file:///etc/a", False),
    ],
)
def test_an_address_is_below_what_is_listed_or_not(url: str, is_listed: bool) -> None:
    assert (host_of(GitCode(url=url, commit=COMMIT).url, HOSTS) is not None) == is_listed


@pytest.mark.parametrize(
    "url",
    [
        *("", "a/b", "git@git.example:a/b.git", "ext::sh -c id", "git://git.example/a", "ftp://git.example/a"),
        *("https://git.example", "https://git.example/", "https:///a", "file://host/a", "https://git.example/../a"),
        *("https://user:word@git.example/a", "https://token@git.example/a", "ssh://git:word@git.example/a"),
        *("https://git.example/a?b=c", "https://git.example/a#b", "https://git.example/a b", "--upload-pack=id"),
        *(
            "ssh://-oProxyCommand=id/a",
            "ssh://git@-oProxyCommand=id/a",
            "file:///srv/git/../../etc",
            "https://git.example/-a",
        ),
        *(
            "https://git.example/%2e%2e/a",
            "https://git.example:0/a",
            "https://git.example:x/a",
            "https://git.example/a\n",
        ),
        "https://git.example/" + "a" * 1_000,
    ],
)
def test_what_is_no_plain_address_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        GitCode(url=url, commit=COMMIT)


@pytest.mark.parametrize("commit", ["main", "HEAD", COMMIT[:12], COMMIT.upper(), f"{COMMIT}0", "", f"{COMMIT[:-1]}\n"])
def test_a_commit_is_named_whole(commit: str) -> None:
    with pytest.raises(ValidationError):
        GitCode(url="https://git.example/a", commit=commit)


@pytest.mark.parametrize("code", [{}, {"sha256": "0" * 64, "git": {"url": "https://git.example/a", "commit": COMMIT}}])
def test_code_has_one_source(code: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="either sha256"):
        Code.model_validate(code)


@pytest.mark.parametrize(
    "host", ["", "a b", "git://a", "https://user:word@a", "file:///", "ssh://-a", "https://a/../b"]
)
def test_what_is_no_host_is_refused_at_the_start(host: str) -> None:
    with pytest.raises(ValueError, match="git"):
        GitHost.parse(host)
    with pytest.raises(ValidationError):
        Settings(git_hosts=(host,))
