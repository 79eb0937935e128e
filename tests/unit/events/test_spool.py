"""The spool: what was appended is read, in order, across torn writes, restarts and full disks."""

import os
import threading
import time
from pathlib import Path

import pytest

from apt_jobs.errors import InvalidInput
from apt_jobs.events import spool
from apt_jobs.events.kinds import LineLogged
from apt_jobs.events.spool import CLOSE_TIMEOUT_S, SpoolReader, SpoolWriter


def line(number: int) -> LineLogged:
    return LineLogged("info", "rank 0", f"line {number}")


def messages(reader: SpoolReader) -> list[str]:
    return [event.message for _, event in reader.read() if isinstance(event, LineLogged)]


def test_events_are_read_once_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rank-0.spool"
    reader = SpoolReader(path)
    assert messages(reader) == []
    assert not reader.has_more()
    with SpoolWriter(path) as writer:
        writer.append(line(1))
        writer.append(line(2))
    assert reader.has_more()
    assert messages(reader) == ["line 1", "line 2"]
    assert not reader.has_more()
    with SpoolWriter(path) as writer:
        writer.append(line(3))
    assert messages(reader) == ["line 3"]
    assert messages(reader) == []


def test_reading_goes_on_where_another_reader_stopped(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.spool"
    with SpoolWriter(path) as writer:
        for number in range(3):
            writer.append(line(number))
    first = SpoolReader(path)
    next(first.read())
    assert messages(SpoolReader(path, first.offset)) == ["line 1", "line 2"]


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.spool"
    with SpoolWriter(path) as writer:
        writer.append(line(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    reader = SpoolReader(path)
    assert messages(reader) == []
    path.write_bytes(whole)
    assert messages(reader) == ["line 1"]


def test_a_bad_line_is_named_once_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.spool"
    with SpoolWriter(path) as writer:
        writer.append(line(1))
    with path.open("ab") as file:
        file.write(b"rubbish\n\n")
    with SpoolWriter(path) as writer:
        writer.append(line(2))
    reader = SpoolReader(path)
    with pytest.raises(InvalidInput, match="rubbish"):
        list(reader.read())
    assert messages(reader) == ["line 2"]


def test_a_line_without_end_does_not_hold_up_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.spool"
    with SpoolWriter(path) as writer:
        os.write(writer._fd, b"x" * (5 << 20) + b"\n")
        writer.append(line(1))
    reader, found = SpoolReader(path), []
    for _ in range(4):
        try:
            found += messages(reader)
        except InvalidInput:
            continue
    assert found == ["line 1"]


def test_events_told_together_are_lines_in_their_order_and_all_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.spool"
    writer = SpoolWriter(path, max_bytes=600)
    writer.append(line(1), line(2), LineLogged("info", "rank 0", "x" * 600), line(3))
    assert messages(SpoolReader(path)) == ["line 1", "line 2"]
    assert writer.num_dropped == 2
    writer.close()


def test_a_bounded_spool_ends_with_the_last_event_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.spool"
    with SpoolWriter(path, max_bytes=250) as writer:
        writer.append(line(1))
        writer.append(line(2))
        writer.append(LineLogged("info", "rank 0", "x" * 300))
        writer.append(line(3))
    assert messages(SpoolReader(path)) == ["line 1", "line 2"]
    assert writer.num_dropped == 2


def test_a_full_disk_drops_and_counts_but_never_raises(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "rank-0.spool")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._fd)
    os.close(full)
    writer.append(line(1))
    writer.close()
    assert writer.num_dropped == 1


def test_a_line_cut_by_the_disk_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank-0.spool"
    writer = SpoolWriter(path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10] if len(data) > 10 else data))
    writer.append(line(1))
    writer.close()
    monkeypatch.undo()
    with SpoolWriter(path) as further:
        further.append(line(2))
    assert writer.num_dropped == 1
    reader = SpoolReader(path)
    with pytest.raises(InvalidInput):
        list(reader.read())
    assert messages(reader) == ["line 2"]


def test_a_hanging_disk_holds_up_nobody_and_gets_everything_later(tmp_path: Path) -> None:
    pipe = tmp_path / "rank-0.spool"  # whose reader takes nothing: a write to it hangs once 64 KiB are there
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = SpoolWriter(pipe)
    began_s = time.monotonic()
    for number in range(2_000):
        writer.append(LineLogged("info", "rank 0", f"line {number} " + "x" * 200))
    took_s = time.monotonic() - began_s
    hangs = writer._is_slow
    os.set_blocking(reading, True)
    path = tmp_path / "copy"
    copying = threading.Thread(target=lambda: path.write_bytes(Path(f"/dev/fd/{reading}").read_bytes()))
    copying.start()
    writer.close()
    copying.join()
    os.close(reading)
    assert hangs
    assert took_s < CLOSE_TIMEOUT_S / 3
    assert [message.split()[1] for message in messages(SpoolReader(path))] == [str(number) for number in range(2_000)]
    assert writer.num_dropped == 0


def test_what_a_hanging_disk_cannot_take_is_bounded_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MAX_UNWRITTEN_BYTES", 1 << 18)
    monkeypatch.setattr(spool, "CLOSE_TIMEOUT_S", 0.1)
    pipe = tmp_path / "rank-0.spool"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = SpoolWriter(pipe)
    for number in range(2_000):
        writer.append(LineLogged("info", "rank 0", f"line {number} " + "x" * 200))
    writer.close()
    assert 0 < writer.num_dropped < 2_000
    os.close(reading)


def test_a_long_spool_is_read_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank-0.spool"
    with SpoolWriter(path) as writer:
        for number in range(50):
            writer.append(line(number))
    monkeypatch.setattr(spool, "READ_CHUNK_BYTES", 100)
    monkeypatch.setattr(spool, "MAX_EVENT_BYTES", 300)
    reader = SpoolReader(path)
    assert 1 <= len(messages(reader)) < 50
    read = 0
    while more := messages(reader):
        read += len(more)
    assert read < 50
    assert reader.offset == path.stat().st_size
