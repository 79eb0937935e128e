"""What of a folder is packed, and which sentence a folder gets that cannot be; what a worker unpacks is the same."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from apt_jobs.artifacts.code import add_code, delete_code, find_code, stale_code, touch_code, unpack_code
from apt_jobs.client.packing import pack_folder
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.jobs.code import ABOUT_NAME, MAX_FILES, CodeOrigin

MAX_BYTES = 1 << 20


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with one commit."""
    folder = tmp_path / "code"
    (folder / "pkg").mkdir(parents=True)
    (folder / "train.py").write_text("print(1)\n")
    (folder / "pkg" / "über.py").write_text("x = 1\n")
    (folder / ".gitignore").write_text("*.bin\nout/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def names_of(folder: Path) -> list[str]:
    with pack_folder(folder, MAX_BYTES) as packed:
        return list(packed.names)


def refusal_of(folder: Path) -> str:
    with pytest.raises(InvalidInput) as caught, pack_folder(folder, MAX_BYTES):
        pass
    return str(caught.value)


def kept(folder: Path, code_dir: Path) -> str:
    code_dir.mkdir(exist_ok=True)
    with pack_folder(folder, MAX_BYTES) as packed:
        upload = code_dir / ".upload-1"
        upload.write_bytes(packed.file.read())
        add_code(code_dir, upload, packed.sha256)
        return packed.sha256


def test_tracked_and_untracked_files_are_packed_and_ignored_ones_are_not(folder: Path) -> None:
    (folder / "new.py").write_text("")
    (folder / "weights.bin").write_bytes(bytes(4 << 20))
    (folder / "out").mkdir()
    (folder / "out" / "x").write_text("")
    (folder / "apt_jobs_runs").mkdir()
    (folder / "apt_jobs_runs" / "x").write_text("")
    (folder / "pkg" / "über.py").unlink()
    assert names_of(folder) == [".gitignore", "new.py", "train.py"]


def test_a_repository_in_the_folder_is_packed_with_it(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    git(inner, "init", "--quiet")
    (inner / "a.py").write_text("")
    assert "inner/a.py" in names_of(folder)


def test_without_git_caches_and_environments_are_left_out(tmp_path: Path) -> None:
    for name in ("train.py", "__pycache__/train.pyc", ".venv/bin/python", "data/.hidden", ".git_is_not_this"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    assert names_of(tmp_path) == [".git_is_not_this", "data/.hidden", "train.py"]


def test_equal_folders_have_equal_hashes_and_a_change_is_recorded(folder: Path) -> None:
    git(folder, "remote", "add", "origin", "https://me:secret@example.com/x.git")
    with pack_folder(folder, MAX_BYTES) as first, pack_folder(folder, MAX_BYTES) as second:
        assert first.sha256 == second.sha256
        origin = first.origin
    assert (origin.commit, origin.branch) == (git(folder, "rev-parse", "HEAD").strip(), "main")
    assert (origin.remote, origin.is_dirty, origin.diff) == ("https://example.com/x.git", False, "")
    os.utime(folder / "train.py", (1, 1))
    (folder / "train.py").write_text("print(2)\n")
    with pack_folder(folder, MAX_BYTES) as third:
        assert third.sha256 != first.sha256
        assert third.origin.is_dirty
        assert "-print(1)\n+print(2)\n" in third.origin.diff


def test_a_folder_that_is_too_large_names_its_largest_file_and_reads_nothing(folder: Path) -> None:
    with (folder / "model.pt").open("wb") as file:
        file.truncate(1 << 40)
    assert refusal_of(folder).count("'model.pt' (1,099,511,627,776 bytes)") == 1
    (folder / "model.pt").unlink()
    with pytest.raises(InvalidInput, match=r"'train\.py'"), pack_folder(folder, 5):
        pass


def test_what_no_worker_could_have_is_named(folder: Path, tmp_path: Path) -> None:
    bad = folder / "two\nlines.py"
    bad.write_text("")
    assert r"two\nlines.py" in refusal_of(folder)
    bad.unlink()
    raw = os.fsencode(folder) + b"/\xff.py"
    Path(os.fsdecode(raw)).write_text("")
    assert r"\xff.py" in refusal_of(folder)
    Path(os.fsdecode(raw)).unlink()
    for number, target in enumerate(("/etc/passwd", "../outside", "pkg/../../outside")):
        link = folder / f"link{number}"
        link.symlink_to(target)
        assert f"'link{number}' is a link out of the folder" in refusal_of(folder)
        link.unlink()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "code").rename(tmp_path / ".venv")
    assert "'pipe' is no regular file" in refusal_of(tmp_path)
    assert "no folder" in refusal_of(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "nothing to run" in refusal_of(tmp_path / "empty")


def test_what_is_unpacked_is_what_was_packed_over_what_an_attempt_left(folder: Path, tmp_path: Path) -> None:
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "latest").symlink_to("pkg/über.py")
    code_dir, target = tmp_path / "kept", tmp_path / "job"
    sha256 = kept(folder, code_dir)
    target.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (target / "train.py").write_text("changed by the first attempt")
    (target / "pkg").symlink_to(outside)
    (target / "result.txt").write_text("of the first attempt")
    unpack_code(code_dir, sha256, target)
    assert (target / "train.py").read_text() == "print(1)\n"
    assert (target / "latest").read_text() == (target / "pkg" / "über.py").read_text() == "x = 1\n"
    assert (target / "result.txt").read_text() == "of the first attempt"
    assert list(outside.iterdir()) == []
    assert (target / "run.sh").stat().st_mode & 0o777 == 0o700
    assert not (target / ABOUT_NAME).exists()


def test_code_that_nobody_asks_for_is_stale_and_a_missing_one_is_named(folder: Path, tmp_path: Path) -> None:
    sha256 = kept(folder, tmp_path / "kept")
    assert find_code(tmp_path / "kept", sha256).num_files == 3
    assert list(stale_code(tmp_path / "kept", 60.0)) == []
    os.utime(tmp_path / "kept" / f"{sha256}.json", (1, 1))
    assert list(stale_code(tmp_path / "kept", 60.0)) == [sha256]
    touch_code(tmp_path / "kept", sha256)
    assert list(stale_code(tmp_path / "kept", 60.0)) == []
    delete_code(tmp_path / "kept", sha256)
    with pytest.raises(NotFound, match=sha256):
        find_code(tmp_path / "kept", sha256)


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    about = CodeOrigin().model_dump_json().encode()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        first = tarfile.TarInfo(ABOUT_NAME)
        first.size = len(about)
        tar.addfile(first, io.BytesIO(about))
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _of(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (_tar(_of("../evil.py")), "'../evil.py' leads out"),
        (_tar(_of("/etc/evil.py")), "leads out"),
        (_tar(_of("a", tarfile.SYMTYPE, "/etc")), "'a' is a link out of the folder, to '/etc'"),
        (_tar(_of("a", tarfile.LNKTYPE, "../x")), "'a' is no regular file"),
        (_tar(_of("dev", tarfile.CHRTYPE)), "'dev' is no regular file"),
        (_tar(_of("a\x1b[2J")), "not printable"),
        (_tar(_of("a"), _of("a")), "'a' twice"),
        (_tar(*(_of(f"f{number}") for number in range(MAX_FILES + 1))), "more than 20,000 files"),
        (_tar(_of("a"))[:700], "no tar file"),
        (b"\x1f\x8b" + bytes(600), "no tar file"),
        (b"", "no tar file"),
    ],
    ids=["parent", "root", "link", "hard-link", "device", "escape", "twice", "many", "cut", "gzip", "empty"],
)
def test_a_forged_upload_is_refused(tmp_path: Path, packed: bytes, words: str) -> None:
    upload = tmp_path / ".upload-1"
    upload.write_bytes(packed)
    with pytest.raises(InvalidInput, match=words.replace("[", r"\[")):
        add_code(tmp_path, upload, "0" * 64)
    assert [path.name for path in tmp_path.iterdir()] == [".upload-1"]


def test_a_chain_of_links_leads_nowhere_out(tmp_path: Path) -> None:
    upload = tmp_path / ".upload-1"
    deep = _tar(
        _of("w/file"), _of("x/y/z", tarfile.SYMTYPE, "../../w"), _of("k", tarfile.SYMTYPE, "x/y/z/../../../out")
    )
    upload.write_bytes(deep)
    record = add_code(tmp_path, upload, "1" * 64)
    (tmp_path / "job").mkdir()
    if record.num_files:
        with pytest.raises(InvalidInput, match="'k' is a link out"):
            unpack_code(tmp_path, "1" * 64, tmp_path / "job")
    assert not (tmp_path / "job" / "k").is_symlink()
