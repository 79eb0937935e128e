"""Commits that jobs run, fetched once: `<git>/<hash of address and commit>/tree.tar`, shared under a lock.

git is started with the address and the protocol that the operator listed and no other: it follows no redirect, runs no
hook, asks nobody, and fetches no submodule. What it wrote is checked as packed code is.
"""

import hashlib
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from apt_jobs.artifacts.code import write_members
from apt_jobs.artifacts.shared_space import prune_shared, size_of_folder
from apt_jobs.errors import InvalidInput, WorkerLacks
from apt_jobs.folder_lock import FolderLock, lock_path
from apt_jobs.jobs.code import packed_members
from apt_jobs.jobs.code_source import GitCode
from apt_jobs.jobs.run_file import GitPlan

TREE_NAME = "tree.tar"
MAX_REASON_CHARS = 1_000
_POLL_S = 0.05
_SIZE_EVERY_S = 1.0
_NETWORK = (
    "Could not resolve",
    "Failed to connect",
    "Couldn't connect",
    "Connection refused",
    "timed out",
    "Connection reset",
)


class GitFetcher:
    """Fetches the commit of one attempt. Constructing it touches nothing."""

    def __init__(self, plan: GitPlan, log_file: Path, environment: Mapping[str, str], wait: Callable[[], None]) -> None:
        """`environment` is what git sees; `wait` is called often, and raises when the attempt is to end."""
        self._plan, self._log_file, self._wait_once = plan, log_file, wait
        self._deadline_s = time.monotonic() + plan.timeout_s
        self._environment = {
            **environment,
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "true",
            "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o StrictHostKeyChecking=yes",
            "GIT_LFS_SKIP_SMUDGE": "1",
            "LC_ALL": "C",
        }

    def write(self, code: GitCode, folder: Path) -> None:
        """Write the files of a commit into a folder, over what is there; other files of the folder stay.

        Raises:
            InvalidInput: there is no such commit, or it is too large or holds what no job may have.
            WorkerLacks: git or the network is not there, or it took too long.
        """
        name = hashlib.sha256(f"{code.url} {code.commit}".encode()).hexdigest()
        kept = self._plan.cache_dir / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(lock_path(kept))
        try:
            while not (lock.try_shared() and (kept / TREE_NAME).is_file()):
                if lock.try_exclusive():
                    if not (kept / TREE_NAME).is_file():
                        self._fetch(code, kept)
                else:
                    self._wait()
            os.utime(kept)
            with (kept / TREE_NAME).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                write_members(tar, packed_members(tar, has_folders=True), folder)
        finally:
            lock.close()
        prune_shared(self._plan.cache_dir, self._plan.max_cache_bytes)

    def _fetch(self, code: GitCode, kept: Path) -> None:
        temporary = kept.with_name(f".tmp-{kept.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        self._note(f"fetches {code.commit} of {code.url}")
        try:
            self._git(["init", "--quiet", "--bare", str(temporary)], temporary)
            where = ["--git-dir", str(temporary)]
            words = [
                "fetch",
                "--quiet",
                "--depth=1",
                "--no-tags",
                "--no-recurse-submodules",
                "--",
                code.url,
                code.commit,
            ]
            self._git([*where, *_guards(code.url), *words], temporary)
            self._git([*where, "cat-file", "commit", code.commit], temporary)  # a tree or a tag is none
            self._git([*where, "archive", "--format=tar", f"--output={temporary / TREE_NAME}", code.commit], temporary)
            for path in temporary.iterdir():
                if path.name != TREE_NAME:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            temporary.rename(kept)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _git(self, words: Sequence[str], folder: Path) -> None:
        """Run git to its end, within the limits of time and size."""
        output = self._log_file.with_suffix(".git")
        try:
            with output.open("wb") as file:
                process = subprocess.Popen(
                    ["git", *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._environment, cwd="/"
                )
            self._await(process, folder)
            if process.returncode:
                raise _fault(output.read_bytes().decode(errors="replace").strip(), process.returncode)
        except FileNotFoundError as exc:
            raise WorkerLacks("this worker has no git, which fetches the code of jobs") from exc
        finally:
            output.unlink(missing_ok=True)

    def _await(self, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        measured_s = 0.0
        try:
            while process.poll() is None:
                self._wait()
                if time.monotonic() - measured_s > _SIZE_EVERY_S:
                    self._require_size(folder)
                    measured_s = time.monotonic()
            self._require_size(folder)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _require_size(self, folder: Path) -> None:
        num_bytes = size_of_folder(folder)
        if num_bytes > 2 * self._plan.max_bytes:  # objects, then the files of the commit beside them
            raise InvalidInput(f"the commit has more than {self._plan.max_bytes:,} bytes (APT_JOBS_MAX_GIT_BYTES)")

    def _wait(self) -> None:
        self._wait_once()
        if time.monotonic() > self._deadline_s:
            raise WorkerLacks(
                f"the commit was not there within {self._plan.timeout_s:g} s: use a smaller repository, or have the "
                "operator raise APT_JOBS_GIT_TIMEOUT_S"
            )
        time.sleep(_POLL_S)

    def _note(self, message: str) -> None:
        with self._log_file.open("a") as log:
            log.write(f"{message}\n")


def _guards(url: str) -> list[str]:
    """Return options that leave git one protocol, and nothing to run."""
    options = {
        "protocol.allow": "never",
        f"protocol.{urlsplit(url).scheme}.allow": "always",
        "http.followRedirects": "false",
        "core.hooksPath": os.devnull,
        "core.fsmonitor": "false",
        "fetch.fsckObjects": "true",
        "gc.auto": "0",
    }
    return [word for name, value in options.items() for word in ("-c", f"{name}={value}")]


def _fault(output: str, status: int) -> InvalidInput | WorkerLacks:
    message = f"the commit cannot be fetched: {output[-MAX_REASON_CHARS:] or f'git exited with {status}'}"
    is_ours = status < 0 or any(word in output for word in _NETWORK)
    return WorkerLacks(message) if is_ours else InvalidInput(message)
