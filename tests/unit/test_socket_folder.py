"""Where the embedded Valkey's socket lies when the data directory's name is too long for one."""

import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_jobs.errors import Denied, InvalidInput
from apt_jobs.socket_folder import find_socket, prepare_socket, remove_socket_folder


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    return tmp_path / ("x" * 100) / "valkey"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of this test with a short name, and no runtime directory."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    del tmp_path  # it is made first, where tests have theirs
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_a_short_path_is_the_one_in_the_data_directory(temporary: Path) -> None:
    folder = temporary / "valkey"
    assert prepare_socket(folder) == find_socket(folder) == folder / "valkey.sock"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_letters_count_as_bytes(temporary: Path) -> None:
    folder = temporary / ("ü" * 40) / "valkey"
    assert len(str(folder / "valkey.sock")) < 100
    assert prepare_socket(folder).parent != folder


def test_another_process_finds_the_folder_that_was_made(long_folder: Path, temporary: Path) -> None:
    made = prepare_socket(long_folder)
    assert made.parent.parent == temporary
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert find_socket(long_folder) == made
    assert prepare_socket(long_folder) == made  # started again
    remove_socket_folder(long_folder)
    assert not made.parent.exists()


def test_two_data_directories_do_not_meet(tmp_path: Path) -> None:
    folders = [tmp_path / (letter * 100) / "valkey" for letter in "ab"]
    assert len({prepare_socket(folder) for folder in folders}) == 2


def test_nobody_listens_where_nothing_was_started(long_folder: Path) -> None:
    assert find_socket(long_folder) == long_folder / "valkey.sock"


def test_a_runtime_directory_is_used_if_it_is_private(
    long_folder: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = temporary / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert prepare_socket(long_folder).parent.parent == runtime
    remove_socket_folder(long_folder)
    runtime.chmod(0o755)
    assert prepare_socket(long_folder).parent.parent == temporary


@pytest.mark.parametrize("named", ["", "relative", "/nowhere/at/all", "/" + "y" * 90])
def test_a_runtime_directory_that_cannot_be_used_is_passed_over(
    long_folder: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", named)
    assert prepare_socket(long_folder).parent.parent == temporary


def test_a_folder_that_others_can_enter_is_refused(long_folder: Path) -> None:
    made = prepare_socket(long_folder)
    made.parent.chmod(0o755)
    for use in (find_socket, prepare_socket):
        with pytest.raises(Denied, match="only this user"):
            use(long_folder)
    remove_socket_folder(long_folder)
    assert made.parent.exists()  # it may be another's


def test_a_folder_that_was_replaced_by_a_link_is_refused(long_folder: Path, tmp_path: Path) -> None:
    made = prepare_socket(long_folder)
    made.parent.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    made.parent.symlink_to(elsewhere)
    with pytest.raises(Denied):
        find_socket(long_folder)


def test_a_folder_that_a_cleaner_took_away_is_made_again(long_folder: Path) -> None:
    made = prepare_socket(long_folder)
    made.parent.rmdir()
    assert prepare_socket(long_folder) != made


def test_a_system_without_short_directories_says_so(
    long_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("z" * 90)))
    monkeypatch.setattr("apt_jobs.socket_folder.UNIX_SOCKET_PATH_MAX", 20)
    with pytest.raises(InvalidInput, match="TMPDIR"):
        prepare_socket(long_folder)
