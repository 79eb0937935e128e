"""What ranks print becomes lines: whole, once, bounded, whatever the bytes and however reads cut them."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_jobs.events.kinds import LineLogged
from apt_jobs.supervision import line_framing, line_gate, rank_log_file
from apt_jobs.supervision.line_framing import REWRITE_EVERY_S, LineFramer, shown_lines
from apt_jobs.supervision.rank_logs import RankLogs

STREAM = "first\r\n\r 10%|#\r 50%|## grün\r100%|####\nline\u2028separator\x0cfeed\x85\n\n \n日本語 ✓\nlast".encode()
LINES = ["first", "100%|####", "line\u2028separator\x0cfeed\x85", "日本語 ✓", "last"]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Rank:
    """The files of rank 0, and what is read of them."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.logs = RankLogs(folder, 1, clock=self.clock)
        self.file = folder / "torchrun" / "node-0" / "x" / "attempt_0" / "0" / "stdout.log"
        self.file.parent.mkdir(parents=True)
        self.writer = self.file.open("wb", buffering=0)

    def prints(self, data: bytes) -> None:
        self.writer.write(data)

    def read(self, after_s: float = 0.1) -> list[LineLogged]:
        self.clock.now_s += after_s
        events = []
        while batch := self.logs.read(10_000):
            events += [event for _, event in batch if isinstance(event, LineLogged)]
        return events

    def lines(self, after_s: float = 0.1) -> list[str]:
        return [event.message for event in self.read(after_s)]

    def ends(self) -> list[str]:
        self.logs.end()
        return self.lines()


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(tmp_path)
    yield rank
    rank.writer.close()


def test_lines_are_the_same_wherever_reads_cut_the_bytes() -> None:
    for cut in range(len(STREAM) + 1):
        framer = LineFramer()
        assert [*framer.feed(STREAM[:cut], 0.0), *framer.feed(STREAM[cut:], 0.0), *framer.end()] == LINES, cut
    generator = random.Random(1)
    for _ in range(200):
        cuts = sorted(generator.choices(range(len(STREAM)), k=6))
        framer, lines = LineFramer(), list[str]()
        for start, end in zip([0, *cuts], [*cuts, len(STREAM)], strict=True):
            lines += framer.feed(STREAM[start:end], 0.0)
        assert lines + framer.end() == LINES


def test_the_last_line_needs_no_line_feed(rank: Rank) -> None:
    rank.prints(b"whole\nnot whole")
    assert rank.lines() == ["whole"]
    assert rank.ends() == ["not whole"]


def test_a_line_that_is_not_finished_is_shown_after_a_while_and_again_when_it_is(rank: Rank) -> None:
    rank.prints(b"Loading")
    assert rank.lines() == []
    assert rank.lines(REWRITE_EVERY_S) == ["Loading"]
    assert rank.lines(REWRITE_EVERY_S) == []
    rank.prints(b" ... done\n")
    assert rank.lines() == ["Loading ... done"]
    rank.prints(b"waiting")
    assert rank.lines() + rank.lines(REWRITE_EVERY_S) == ["waiting"]
    rank.prints(b"\n")
    assert rank.lines() == []


@pytest.mark.parametrize("form", ["\r{}", "{}\r", "\r{}\r"])
def test_a_progress_bar_shows_a_state_every_few_seconds_and_its_last_one(rank: Rank, form: str) -> None:
    shown = []
    for percent in range(101):
        rank.prints(form.format(f"{percent}%").encode())
        shown += rank.lines(0.5)  # 50 s
    rank.prints(b"\n")
    shown += rank.lines()
    assert 8 <= len(shown) <= 12
    assert shown[-1] == "100%"
    assert [line for line in shown if not line.endswith("%")] == []


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r     \r", b"\r     \r\n", b"\r\r\r"])
def test_a_progress_bar_leaves_its_last_state_however_it_ends(rank: Rank, ending: bytes) -> None:
    rank.prints(b"\r 10%\r 50%\r 90%" + ending)
    assert rank.lines() + rank.ends() == [" 90%"]


def test_bytes_that_are_no_text_lose_no_line(rank: Rank) -> None:
    rank.prints(b"a\xff\xfe\0b\n\xe6\x97\ncut \xe6\x97")
    assert rank.lines() + rank.ends() == ["a\ufffd\ufffd\u2400b", "\ufffd", "cut \ufffd"]


@pytest.mark.parametrize("length", [2_001, 300_000, 3_000_000])
def test_a_long_line_is_one_line_with_its_beginning_and_its_end(rank: Rank, length: int) -> None:
    rank.prints(b"begin" + b"x" * (length - 8))
    rank.lines()
    rank.prints(b"end\nnext\n")
    shown = rank.lines() + rank.lines() + rank.lines() + rank.ends()
    assert len(shown) == 2
    assert len(shown[0]) < 2_100
    assert shown[0].startswith("beginx")
    assert f"[... {length - 2_000:,} characters left out ...]" in shown[0]
    assert shown[0].endswith("xend")
    assert shown[1] == "next"


def test_a_flood_leaves_its_first_and_its_last_lines_and_bounded_files(rank: Rank) -> None:
    piece, count, shown = b"".join(b"%099d\n" % index for index in range(10_000)), 100, list[str]()
    for _ in range(count):  # 100 MB
        rank.prints(piece)
        shown += rank.lines(0.01)
    rank.prints(b"the end, and no line feed")
    assert rank.file.stat().st_blocks * 512 <= 32 << 20
    shown += rank.ends()
    assert len(shown) < 10_000
    assert shown[: line_gate.FIRST_LINES] == [f"{index:099d}" for index in range(line_gate.FIRST_LINES)]
    expected_last = [f"{index:099d}" for index in range(10_000)][-line_gate.LAST_LINES + 1 :]
    assert shown[-line_gate.LAST_LINES :] == [*expected_last, "the end, and no line feed"]
    assert any("left out here" in line for line in shown)
    assert rank.file.stat().st_size <= 17 << 20
    kept = rank.file.read_bytes()
    assert kept.startswith(piece[:1000])
    assert kept.endswith(b"the end, and no line feed")
    assert b"bytes left out" in kept


def test_two_hundred_megabytes_at_once_leave_first_and_last_lines(rank: Rank) -> None:
    piece = b"".join(b"%099d\n" % index for index in range(10_000))
    for _ in range(200):
        rank.prints(piece)
    shown = rank.ends()
    assert shown[0] == f"{0:099d}"
    assert shown[-1] == f"{9_999:099d}"
    assert 2 * line_gate.FIRST_LINES <= len(shown) < 10_000


def test_a_log_is_never_closed_for_good(rank: Rank) -> None:
    for _ in range(60):  # more than may pass for free
        rank.prints(b"x\n" * 1_000)
        rank.lines(1.0)
    rank.lines(3600.0)
    for index in range(100):  # then one a second: all of them
        rank.prints(b"line %d\n" % index)
        rank.lines(1.0)
    rank.prints(b"here\n")
    assert "here" in rank.lines(30.0) + rank.lines(30.0)


def test_a_burst_passes_whole_if_there_are_seconds_for_it(rank: Rank) -> None:
    shown = []
    for _ in range(3):
        rank.prints(b"".join(b"%d\n" % index for index in range(1_500)))
        for _ in range(100):
            shown += rank.lines(0.1)
    assert shown == [str(index) for index in range(1_500)] * 3


def test_any_byte_is_a_sign_of_life(rank: Rank) -> None:
    for data in (b"x", b"\r", b"\0", b"\xe6", b"\n", b" "):
        rank.prints(data)
        rank.read(10.0)
        assert rank.logs.last_output_s == rank.clock.now_s
    silent_since_s = rank.clock.now_s
    rank.read(100.0)
    assert rank.logs.last_output_s == silent_since_s


def test_standard_error_is_no_warning_by_itself(rank: Rank) -> None:
    rank.file.with_name("stderr.log").write_text("hello\n")
    assert [(event.level, event.source, event.message) for event in rank.read()] == [("info", "rank 0", "hello")]


def test_many_ranks_share_the_limits_and_a_loud_one_silences_nobody(tmp_path: Path) -> None:
    clock = Clock()
    logs = RankLogs(tmp_path, 8, num_ranks=8, clock=clock)
    for local_rank in range(8):
        folder = tmp_path / "torchrun" / "node-0" / "x" / "attempt_0" / str(local_rank)
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text("loud\n" * 100_000 if local_rank else "".join(f"{i}\n" for i in range(100)))
    logs.end()
    events = [event for _, event in logs.read(100_000) if isinstance(event, LineLogged)]
    assert len(events) < 2 * (line_gate.FIRST_LINES + line_gate.LAST_LINES)
    assert [event.message for event in events if event.source == "rank 0"] == [str(index) for index in range(100)]


def test_a_file_system_that_frees_no_part_of_a_file_is_no_error(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_log_file, "FALLOC_FL_PUNCH_HOLE", 0x4000)  # no such mode
    shown = []
    for _ in range(30):
        rank.prints(b"y" * (1 << 20) + b"\nshort\n")
        shown += rank.lines()
    assert (shown + rank.ends()).count("short") == 30
    assert "a log file keeps growing" in caplog.text


def test_what_is_shown_of_a_finished_file_are_its_last_states() -> None:
    assert shown_lines(STREAM) == LINES
    assert line_framing.shortened("x" * 2_000) == "x" * 2_000
