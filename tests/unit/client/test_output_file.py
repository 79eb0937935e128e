"""Where downloads go: links, FIFOs, devices, descriptors, folders that are not there, disks that are full."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from apt_jobs.client.output_file import is_stream, open_output
from apt_jobs.errors import InvalidInput, OutOfSpace

WRITE = """
import sys
from apt_jobs.client.output_file import open_output
sys.stdout.write("before ")
with open_output(sys.argv[1]) as output:
    output.write(b"content ")
sys.stdout.write("after")
"""


def write(target: str | Path, content: bytes = b"new") -> None:
    with open_output(target) as output:
        output.write(content)


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    with open_output(target) as output:
        output.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    assert names_in(tmp_path) == {"out.csv"}


def test_a_file_is_replaced_with_its_permissions_kept(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_bytes(b"old and longer")
    target.chmod(0o640)
    write(target)
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (b"new", 0o640)


def test_what_was_there_stays_when_writing_breaks(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_bytes(b"old")

    def write_half() -> None:
        with open_output(target) as output:
            output.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (target.read_bytes(), names_in(tmp_path)) == (b"old", {"out.csv"})


@pytest.mark.parametrize("is_there", [True, False])
def test_links_stay_and_what_they_lead_to_is_written(tmp_path: Path, is_there: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real.csv"
    if is_there:
        target.write_bytes(b"old")
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to("elsewhere/real.csv")
    second.symlink_to(first)
    write(second)
    assert target.read_bytes() == b"new"
    assert (first.is_symlink(), second.is_symlink()) == (True, True)
    assert names_in(target.parent) == {"real.csv"}


def test_a_fifo_gets_the_content_and_stays(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to(fifo)
    for target in (fifo, tmp_path / "link"):
        read: list[bytes] = []
        reader = threading.Thread(target=lambda into: into.append(fifo.read_bytes()), args=(read,))
        reader.start()
        write(target)
        reader.join(30)
        assert read == [b"new"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_fifo_whose_reader_leaves_is_one_sentence(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    def write_without_reader() -> None:
        with open_output(fifo) as output:
            os.close(reader)
            output.write(b"x" * (1 << 20))

    with pytest.raises(InvalidInput, match="its reader is gone"):
        write_without_reader()


def test_a_device_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        device.open("wb").close()
    except PermissionError:
        pytest.skip("making a device takes a privilege that is not there")
    write(device)
    assert stat.S_ISCHR(device.stat().st_mode)
    assert names_in(tmp_path) == {"null"}


@pytest.mark.parametrize("target", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "{link}"])
@pytest.mark.parametrize("is_file", [True, False])
def test_standard_output_is_written_to_in_order(tmp_path: Path, target: str, is_file: bool) -> None:
    link, redirected = tmp_path / "link", tmp_path / "redirected"
    link.symlink_to("/dev/stdout")
    command = [sys.executable, "-c", WRITE, target.format(link=link)]
    if is_file:
        with redirected.open("wb") as file:
            file.write(b"first ")
            file.flush()
            inode = redirected.stat().st_ino
            subprocess.run(command, stdout=file, check=True)
        assert redirected.stat().st_ino == inode
        assert redirected.read_bytes() == b"first before content after"
    else:
        assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == b"before content after"
    assert link.is_symlink()


def test_what_is_read_at_once_is_known(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert all(is_stream(target) for target in ("-", "/dev/stdout", "/dev/null", str(tmp_path / "fifo")))
    assert not any(is_stream(target) for target in (tmp_path / "new.csv", "\x00", "x" * 5_000))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/out.csv", "does not exist"),
        ("file/out.csv", "cannot be written|does not exist"),
        ("folder", "is a folder"),
        ("folder/", "is a folder"),
        (".", "is a folder"),
        ("loop", "cannot be written"),
        ("nul\x00", "no name of a file"),
        ("x" * 300, "cannot be written"),
        ("", "."),
    ],
    ids=ascii,
)
def test_a_target_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidInput, match=words):
        write(name)
    assert names_in(tmp_path) == {"folder", "file", "loop"}
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    target = tmp_path / "out.csv"
    target.write_bytes(b"old")
    with pytest.raises(OutOfSpace, match="free some space"):
        write(target)
    assert (target.read_bytes(), names_in(tmp_path)) == (b"old", {"out.csv"})


def test_a_file_in_a_folder_of_others_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    target = tmp_path / "out.csv"
    target.write_bytes(b"old and longer")
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    write(target)
    assert target.read_bytes() == b"new"
    with pytest.raises(InvalidInput, match="Permission denied"):
        write(tmp_path / "new.csv")


def test_a_file_that_is_mounted_alone_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    target = tmp_path / "out.csv"
    target.write_bytes(b"old and longer")
    monkeypatch.setattr(Path, "replace", busy)
    write(target)
    assert (target.read_bytes(), names_in(tmp_path)) == (b"new", {"out.csv"})
