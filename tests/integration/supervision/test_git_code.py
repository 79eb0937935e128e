"""Code of a commit, fetched by git from a real server (`git http-backend`) on loopback."""

import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from apt_jobs.artifacts.git_code import GitFetcher
from apt_jobs.errors import InvalidInput, WorkerLacks
from apt_jobs.jobs.code_source import GitCode
from apt_jobs.jobs.run_file import GitPlan
from apt_jobs.supervision.set_up import StopRequested

NOBODY = "0" * 40
IDENTITY = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


def git(folder: Path, *words: str) -> str:
    environment = {**os.environ, **IDENTITY}
    ended = subprocess.run(["git", *words], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


class Repositories(BaseHTTPRequestHandler):
    """Serves the repositories of `root` by git's own CGI; below /moved everything is a redirect."""

    root: Path
    num_requests = 0

    def do_GET(self) -> None:
        type(self).num_requests += 1
        path, _, query = self.path.partition("?")
        if path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/moved"))
            self.end_headers()
            return
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        environment = {
            **{"PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": str(self.root), "GIT_HTTP_EXPORT_ALL": "1"},
            **{"PATH_INFO": path, "QUERY_STRING": query, "REQUEST_METHOD": self.command, "REMOTE_ADDR": "127.0.0.1"},
            **{"CONTENT_TYPE": self.headers.get("content-type", ""), "CONTENT_LENGTH": str(len(body))},
            "GIT_PROTOCOL": self.headers.get("git-protocol", ""),
            **{"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"},
        }
        ran = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=False)
        head, _, content = ran.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with an older commit, and a branch whose tree holds a link that leads out."""
    folder = tmp_path_factory.mktemp("served") / "code.git"
    folder.mkdir()
    git(folder, "init", "-b", "main")
    (folder / "src").mkdir()
    (folder / "train.py").write_text("print('old')\n")
    (folder / "src" / "run.sh").write_text("exit 0\n")
    (folder / "src" / "run.sh").chmod(0o755)
    (folder / "link.py").symlink_to("train.py")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "old")
    (folder / "train.py").write_text("print('new')\n")
    git(folder, "commit", "-a", "-m", "new")
    git(folder, "checkout", "-b", "evil")
    (folder / "passwd").symlink_to("/etc/passwd")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "evil")
    (folder / "passwd").unlink()
    (folder / "noise").write_bytes(os.urandom(1 << 20))
    git(folder, "add", ".")
    git(folder, "commit", "-m", "large")
    return folder


@pytest.fixture
def server(repository: Path) -> Iterator[str]:
    Repositories.root, Repositories.num_requests = repository.parent, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Repositories) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetcher(tmp_path: Path, **fields: float) -> GitFetcher:
    usual = {"cache_dir": tmp_path / "git", "timeout_s": 60.0, "max_bytes": 1 << 20, "max_cache_bytes": 1 << 30}
    (tmp_path / "set-up.log").touch()
    return GitFetcher(GitPlan.model_validate({**usual, **fields}), tmp_path / "set-up.log", os.environ, lambda: None)


def test_the_very_commit_is_there_and_is_fetched_once(tmp_path: Path, repository: Path, server: str) -> None:
    old = GitCode(url=f"{server}/code.git/.git", commit=git(repository, "rev-parse", "main~1"))
    num_requests: list[int] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text("of an earlier attempt")
        fetcher(tmp_path).write(old, tmp_path / name)
        assert (tmp_path / name / "link.py").read_text() == "print('old')\n"
        assert os.access(tmp_path / name / "src" / "run.sh", os.X_OK)
        num_requests.append(Repositories.num_requests)
    assert num_requests[0] == num_requests[1] > 0
    assert [path.name for path in (tmp_path / "git").glob("*/*")] == ["tree.tar"]
    assert (tmp_path / "set-up.log").read_text().count("fetches") == 1


def test_what_cannot_be_fetched_says_why(tmp_path: Path, repository: Path, server: str) -> None:
    main = git(repository, "rev-parse", "main")
    evil, large = git(repository, "rev-parse", "evil~1"), git(repository, "rev-parse", "evil")
    tree = git(repository, "rev-parse", "main^{tree}")
    address = f"{server}/code.git/.git"
    cases: list[tuple[str, str, dict[str, float], type[Exception], str]] = [
        (f"{server}/none.git", main, {}, InvalidInput, "not found"),
        (address, NOBODY, {}, InvalidInput, "cannot be fetched"),
        (f"{server}/moved/code.git/.git", main, {}, InvalidInput, "error: 302"),
        (address, evil, {}, InvalidInput, "'passwd' is a link out of the folder, to '/etc/passwd'"),
        (address, large, {"max_bytes": 100_000}, InvalidInput, "more than 100,000 bytes"),
        (address, main, {"timeout_s": 0.0}, WorkerLacks, "not there within 0 s"),
        ("http://127.0.0.1:9/code.git", main, {}, WorkerLacks, "127.0.0.1"),
        (address, tree, {}, InvalidInput, "bad file"),
    ]
    (tmp_path / "output").mkdir()
    for url, commit, fields, error, message in cases:
        with pytest.raises(error, match=message):
            fetcher(tmp_path, **fields).write(GitCode(url=url, commit=commit), tmp_path / "output")
    assert list((tmp_path / "git").glob(".tmp-*")) == []


def test_other_protocols_are_closed_to_what_a_repository_names(tmp_path: Path, repository: Path) -> None:
    """An `insteadOf` of whoever runs the worker would lead elsewhere: git is held to the protocol that was listed."""
    main = git(repository, "rev-parse", "main")
    code = GitCode(url=f"file://{repository}/.git", commit=main)
    (tmp_path / "output").mkdir()
    elsewhere = {"GIT_CONFIG_KEY_0": "url.ext::sh -c id.insteadOf", "GIT_CONFIG_VALUE_0": "file:"}
    redirected = {"GIT_CONFIG_COUNT": "1", **elsewhere}
    plan = GitPlan(cache_dir=tmp_path / "git", timeout_s=60.0, max_bytes=1 << 20, max_cache_bytes=0)
    log_file = tmp_path / "set-up.log"
    log_file.touch()
    with pytest.raises(InvalidInput, match="transport 'ext' not allowed"):
        GitFetcher(plan, log_file, {**os.environ, **redirected}, lambda: None).write(code, tmp_path / "output")
    fetcher(tmp_path).write(code, tmp_path / "output")  # by `file://`, which an operator may list
    assert (tmp_path / "output" / "train.py").read_text() == "print('new')\n"


def test_it_stops_when_the_attempt_is_asked_to(tmp_path: Path, repository: Path) -> None:
    def stop() -> None:
        raise StopRequested

    plan = GitPlan(cache_dir=tmp_path / "git", timeout_s=60.0, max_bytes=1 << 20, max_cache_bytes=0)
    (tmp_path / "set-up.log").touch()
    code = GitCode(url=f"file://{repository}/.git", commit=git(repository, "rev-parse", "main"))
    with pytest.raises(StopRequested):
        GitFetcher(plan, tmp_path / "set-up.log", os.environ, stop).write(code, tmp_path)
