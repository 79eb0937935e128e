"""Log files of parts that append to them: they stay short while they are written to."""

from pathlib import Path

from apt_jobs.logs import rotate_log


def test_a_long_log_is_moved_and_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "web.log"
    with path.open("ab", buffering=0) as log:
        log.write(b"a" * 100)
        assert not rotate_log(path, 100)
        log.write(b"b")
        assert rotate_log(path, 100)
        log.write(b"c")
    assert path.read_bytes() == b"c"
    old = tmp_path / "web.log.1"
    assert old.read_bytes() == b"a" * 100 + b"b"
    assert old.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web.log", "web.log.1"]


def test_a_log_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert not rotate_log(tmp_path / "gone.log", 1)
