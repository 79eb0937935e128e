"""`apt-jobs up` in directories with signs that mean something in URLs, and in such that cannot be used."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_jobs.socket_folder import UNIX_SOCKET_PATH_MAX
from tests.acceptance.stack import DEADLINE_S, TINY, Stack, has_both_workers, until

SIGNS = "a #b %41?c&d=ü+e:f@g'h"


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="apt-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("depth", [1, 6], ids=["short", "too long for a socket"])
def test_a_whole_stack_works_whatever_its_directories_are_called(short_path: Path, depth: int) -> None:
    data_dir = short_path.joinpath(*[SIGNS] * depth)
    models_dir = short_path / f"models {SIGNS}"
    stack = Stack(data_dir, APT_JOBS_MODELS_DIR=str(models_dir), XDG_RUNTIME_DIR="")
    try:
        until(lambda: (data_dir / "local.json").exists() or stack.process.poll() is not None)
        assert stack.process.poll() is None, stack.process.communicate()
        is_long = len(os.fsencode(data_dir / "valkey" / "valkey.sock")) >= UNIX_SOCKET_PATH_MAX
        assert is_long is (depth > 1)
        record = data_dir / "valkey" / "socket_folder"
        folder = Path(record.read_text()) if is_long else data_dir / "valkey"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert (folder / "valkey.sock").is_socket()
        with stack.client() as client:
            until(lambda: has_both_workers(client))
            job = client.wait(client.submit(TINY)["id"])
            assert job["state"] == "succeeded", stack.story()
            checkpoint_id = job["result"]["checkpoint_id"]
            client.download(checkpoint_id, short_path / "checkpoint.tar")
            with tarfile.open(short_path / "checkpoint.tar") as archive:
                archive.extractall(short_path, filter="data")
            shutil.move(short_path / checkpoint_id, models_dir / "own")
            for model in (checkpoint_id, "own"):
                assert client.generate("a", max_length=2, model=model)["input_text"] == "a"
        assert (data_dir / "valkey" / "appendonlydir").is_dir()  # not in a temporary directory
    finally:
        stack.process.send_signal(signal.SIGINT)
        stack.process.communicate(timeout=DEADLINE_S)
    assert stack.pids() == []
    assert not is_long or not folder.exists()


def _file(folder: Path) -> Path:
    folder.joinpath("data").write_text("not a folder")
    return folder / "data"


def _below_a_file(folder: Path) -> Path:
    return _file(folder) / "data"


def _read_only(_folder: Path) -> Path:
    return Path("/proc/self/apt_jobs")  # neither root may make anything there


def _name_too_long(folder: Path) -> Path:
    return folder / ("d" * 300)


@pytest.mark.parametrize(
    ("command", "unusable"),
    [
        *(("up", unusable) for unusable in (_file, _below_a_file, _read_only, _name_too_long)),
        *((command, _below_a_file) for command in ("web", "migrate", "keys list", "login-link")),
        *((f"worker {kind}", _below_a_file) for kind in ("train", "generate", "node --head x")),
    ],
)
def test_a_directory_that_cannot_be_used_is_one_sentence(tmp_path: Path, unusable: object, command: str) -> None:
    assert callable(unusable)
    done = run(command, unusable(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("apt-jobs: ")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", ["a\nb", "tab\there", "bell\x07", "\udcff"])
def test_a_directory_with_signs_that_cannot_be_printed_is_refused(tmp_path: Path, name: str) -> None:
    done = run("up", tmp_path / name)
    assert done.returncode == 2
    assert "choose another name" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts need root")
@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("mount -t tmpfs -o size=2m none {0} && head -c 2097152 /dev/zero > {0}/full; true", "No space left on device"),
        ("mount -t tmpfs -o ro none {0}", "Read-only file system"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_sentence(tmp_path: Path, mount: str, words: str) -> None:
    script = mount.format(tmp_path) + f" && exec {sys.executable} -m apt_jobs up"
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    environment = {**os.environ, "APT_JOBS_DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def run(command: str, data_dir: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "APT_JOBS_DATA_DIR": str(data_dir)}
    line = [sys.executable, "-m", "apt_jobs", *command.split()]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
