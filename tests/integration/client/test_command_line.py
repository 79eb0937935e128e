"""The command line against a service that holds hostile text: in pipes, in terminals of three widths, as ASCII.

What a terminal would execute never reaches it, what is copied is whole, and nothing ends with a traceback.
"""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.db.schedules import ScheduleValues, create_schedule
from apt_jobs.db.workers import record_worker
from apt_jobs.events.kinds import LineLogged, StepTrained, TrainingStarted
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState
from tests.integration.client.conftest import Serve
from tests.integration.client.jobs import alter_job, end_job, url_of
from tests.integration.web.served import DEADLINE_S, Served

BRACKETS = ["p [/data/x] run", "[bold]x[/bold] [rank0] loss", "[link=http://x]y[/link] :smile: [[", "\\[x] C:\\temp"]
HOSTILE = {  # what is stored, and how it is shown
    "\x1b]0;t\x07\x1b[2J": "\\x1b]0;t\\x07\\x1b[2J",
    "\x9b31m red": "\\x9b31m red",
    "a\rb\nc\bd\x7f": "a\\rb\\nc\\x08d\\x7f",
    "gnp.\u202egpj": "gnp.\\u202egpj",
    "\u2066x\u2069\u200b\u2028\ufeff": "\\u2066x\\u2069\\u200b\\u2028\\ufeff",
    "\U000e0041": "\\U000e0041",
    "": "-",
}
FRIENDLY = ["\u4e2d\u6587 \u00fc", "\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e", "x" * 180]
NAMES = [*BRACKETS, *HOSTILE, *FRIENDLY]
REASON = "loss [nan] at \x1b[31mstep 3\x1b[0m [/x]"
SHOWN_REASON = "loss [nan] at \\x1b[31mstep 3\\x1b[0m [/x]"
TRACEBACK = 'Traceback [most recent]\n  File "x.py"\tline 1\n\x1b]52;c;ZXZpbA==\x07Error: [/data]'
TERMINAL_S = 60.0
STYLES = re.compile(rb"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r")  # colours and the progress line's own


@pytest.fixture(scope="module")
def service(serve: Serve) -> Iterator[Served]:
    with serve() as started:
        yield started


@pytest.fixture(scope="module")
def jobs(service: Served) -> dict[str, str]:
    """Jobs by name, the last of them failed with a hostile reason."""
    made = {}
    for name in NAMES:
        made[name] = service.new_job()
        alter_job(service, made[name], name=name)
    last = made[NAMES[-1]]
    service.say(
        last, *(LineLogged("info", "rank [0]\x1b[2J", text) for text in [*BRACKETS, *HOSTILE, *FRIENDLY, "\ta"])
    )
    end_job(service, last, JobState.FAILED, REASON)
    alter_job(service, last, error={"message": REASON, "traceback": TRACEBACK, "rank": 0})
    return made


@pytest.fixture(scope="module")
def others(service: Served) -> None:
    """A schedule and a worker with hostile names."""
    hostile = next(iter(HOSTILE))
    with service.database.write() as session:
        values = ScheduleValues(hostile, "@daily", "UTC", TrainSpec(kind="train"), "skip", "latest", False)
        create_schedule(session, values)
        record_worker(
            session,
            name=hostile + "[/x]",
            kind="train",
            queues=["[red]q[/red]\x1b[2J"],
            hostname="h",
            pid=1,
            version="1",
            gpus=[],
            current_job_id=None,
        )


def environment(service: Served, **variables: str) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("APT_JOBS_", "PYTHON", "LC_"))
    }
    return {**inherited, "APT_JOBS_URL": url_of(service), "APT_JOBS_API_KEY": f"{service.key}\n", **variables}


def run(service: Served, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a command with pipes."""
    command = [sys.executable, "-m", "apt_jobs", *arguments]
    done = subprocess.run(
        command, env=environment(service, **variables), capture_output=True, timeout=DEADLINE_S, check=False
    )
    for printed in (done.stdout, done.stderr):
        assert b"Traceback (most recent call last)" not in printed, printed.decode()
        assert service.key.encode() not in printed
    return done


def _restore_interrupts() -> None:
    """Let Ctrl-C work also where the tests run in the background of a shell, which has them ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_in_terminal(
    service: Served, width: int, *arguments: str, until: bytes | None = None, **variables: str
) -> tuple[int, bytes]:
    """Run a command in a terminal of this width; with `until`, interrupt it when that was shown."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "apt_jobs", *arguments],
        env=environment(service, TERM="xterm-256color", COLUMNS=str(width), **variables),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=_restore_interrupts,
    )
    os.close(terminal)
    shown, deadline = b"", time.monotonic() + TERMINAL_S
    with os.fdopen(controller, "rb", buffering=0) as screen:
        while time.monotonic() < deadline:
            if not select.select([screen], [], [], 0.2)[0]:
                continue
            try:
                part = screen.read(1 << 16)
            except OSError:  # its other side is closed
                break
            if not part:
                break
            shown += part
            if until is not None and until in shown:
                process.send_signal(2)
                until = None
        if time.monotonic() >= deadline:
            process.kill()
        return process.wait(DEADLINE_S), shown


def rows_of(printed: str) -> list[str]:
    """The lines of a table without its head."""
    return printed.splitlines()[1:]


def test_a_pipe_gets_whole_rows_of_plain_columns(service: Served, jobs: Mapping[str, str]) -> None:
    done = run(service, "ps", COLUMNS="40")
    assert done.returncode == 0
    rows = rows_of(done.stdout.decode())
    assert len(rows) == len(jobs)
    for name, job_id in jobs.items():
        row = next(row for row in rows if row.startswith(job_id))
        state = "failed" if name == NAMES[-1] else "running"
        assert row.split()[:3] == [job_id, "train", state]
        assert row.endswith("  " + HOSTILE.get(name, name))
    assert done.stdout.isascii() is False
    assert not set(done.stdout.decode()) & set("\x1b\x07\x9b\r\b\x7f\u202e\u2066\u2028\u2500\u2502\u2503\u2026")


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1"])
def test_every_encoding_is_printed(service: Served, jobs: Mapping[str, str], encoding: str) -> None:
    done = run(service, "ps", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    text = done.stdout.decode(encoding.partition(":")[0])
    assert all(job_id in text for job_id in jobs.values())
    assert "\\u4e2d\\u6587" in text


def test_json_in_an_encoding_that_lacks_its_characters_is_the_same_value(
    service: Served, jobs: Mapping[str, str]
) -> None:
    done = run(service, "inspect", jobs[FRIENDLY[0]], PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout.decode("ascii"))["name"] == FRIENDLY[0]


def test_the_locale_of_c_is_printed(service: Served, jobs: Mapping[str, str]) -> None:
    done = run(service, "ps", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0
    assert all(job_id.encode() in done.stdout for job_id in jobs.values())


def test_log_lines_are_shown_as_they_are(service: Served, jobs: Mapping[str, str]) -> None:
    source = "[rank [0]\\x1b[2J] "
    shown = [HOSTILE.get(text, text) if text else "" for text in [*BRACKETS, *HOSTILE, *FRIENDLY]]
    expected = [source + line for line in [*shown, "\ta"]]
    for arguments in (["logs"], ["logs", "-f"]):
        done = run(service, *arguments, jobs[NAMES[-1]])
        assert (done.returncode, done.stdout.decode().split("\n")[:-1]) == (0, expected)


def test_a_failed_job_is_watched_to_its_reason(service: Served, jobs: Mapping[str, str]) -> None:
    done = run(service, "watch", jobs[NAMES[-1]])
    assert done.returncode == 1
    printed = done.stdout.decode()
    assert f"failed: {SHOWN_REASON}" in printed
    assert 'Traceback [most recent]\n  File "x.py"\tline 1\n\\x1b]52;c;ZXZpbA==\\x07Error: [/data]\n' in printed


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD])
def test_the_exit_status_of_a_watch_is_the_job_s(service: Served, state: JobState) -> None:
    job_id = service.new_job()
    end_job(service, job_id, state, "out of [luck]")
    done = run(service, "watch", job_id)
    assert done.returncode == int(state != JobState.SUCCEEDED)
    assert ("out of [luck]" in done.stdout.decode()) == (state != JobState.SUCCEEDED)


def test_json_is_the_same_value_and_safe_to_look_at(service: Served, jobs: Mapping[str, str]) -> None:
    done = run(service, "ps", "--json")
    names = {row["id"]: row["name"] for row in json.loads(done.stdout)}
    assert {names[job_id]: job_id for job_id in jobs.values()} == jobs
    inspected = run(service, "inspect", jobs["gnp.\u202egpj"])
    for printed in (done.stdout, inspected.stdout):
        assert not set(printed.decode()) & set("\x1b\x07\x9b\r\b\x7f\u202e\u2066\u2028")


@pytest.mark.usefixtures("others")
def test_schedules_workers_and_queues_are_escaped(service: Served) -> None:
    hostile, shown = next(iter(HOSTILE.items()))
    listed = run(service, "schedules", "list").stdout.decode()
    assert shown in listed
    workers = run(service, "workers", "list").stdout.decode()
    assert shown + "[/x]" in workers
    assert "[red]q[/red]\\x1b[2J" in workers
    schedule_id = json.loads(run(service, "schedules", "list", "--json").stdout)[0]["id"]
    assert json.loads(run(service, "schedules", "inspect", schedule_id).stdout)["name"] == hostile
    for printed in (listed, workers):
        assert "\x1b" not in printed


def test_errors_are_escaped_sentences(service: Served) -> None:
    for arguments in (["inspect", "[/x]"], ["cancel", "\x1b[2J"], ["watch", "../keys"], ["logs", "-f", "?x"]):
        done = run(service, *arguments)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"apt-jobs: no job")
        assert b"\x1b" not in done.stderr
    done = run(service, "ps", APT_JOBS_API_KEY="apt_\x1b]0;x\x07secret")
    assert done.returncode == 2
    assert b"character that no key has" in done.stderr
    assert b"secret" not in done.stderr


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_of_any_width_shows_ids_and_states_whole(
    service: Served, jobs: Mapping[str, str], width: int
) -> None:
    status, screen = run_in_terminal(service, width, "ps")
    assert status == 0
    assert not STYLES.sub(b"", screen).count(b"\x1b")
    for name, job_id in jobs.items():
        row = next(line for line in screen.decode().split("\r\n") if job_id in line)
        assert row.split()[:3] == [job_id, "train", "failed" if name == NAMES[-1] else "running"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_progress_line_fits_its_terminal(service: Served, width: int) -> None:
    job_id = service.new_job()
    started = TrainingStarted(2, "cpu", "gloo", 1, 1_000_000, 1_000, 64, 0, {})
    service.say(job_id, started)
    alter_job(service, job_id, step=123_456, num_steps=1_000_000)
    lines = LiveSteps(service, job_id)
    with lines:
        status, screen = run_in_terminal(service, width, "watch", job_id, until=b"ETA")
    assert status == 130
    for line in re.split(rb"[\r\n]+", STYLES.sub(b"\n", screen)):
        assert len(line.decode()) <= width, line
    assert b"ETA 730:27:12" in screen


class LiveSteps:
    """Steps of a job, one after the other until the block ends."""

    def __init__(self, service: Served, job_id: str) -> None:
        self._service, self._job_id, self._ended = service, job_id, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        step = StepTrained(123_456, 12, 2.5, 0.001, 1.0, 3_000.0, 12_345.0)
        while not self._ended.wait(0.2):
            self._service.say(self._job_id, step)


def test_without_a_terminal_a_line_comes_every_few_seconds(service: Served) -> None:
    job_id = service.new_job()
    command = [sys.executable, "-m", "apt_jobs", "watch", job_id]
    with subprocess.Popen(command, env=environment(service), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        began = time.monotonic()
        lines = [process.stdout.readline() for _ in range(3)]
        assert time.monotonic() - began > 8
        end_job(service, job_id, JobState.CANCELLED, "enough")
        lines += process.stdout.readlines()
        assert process.wait(DEADLINE_S) == 1
    assert all(line.startswith("running  elapsed 00:") for line in lines[:3])
    assert lines[-1] == "cancelled: enough\n"


def test_a_reader_that_leaves_ends_a_command_quietly(service: Served, jobs: Mapping[str, str]) -> None:
    for arguments in (["ps"], ["watch", service.new_job()]):
        command = [sys.executable, "-m", "apt_jobs", *arguments]
        with subprocess.Popen(
            command, env=environment(service), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(DEADLINE_S) == 1


def test_exports_go_where_they_are_sent(service: Served, jobs: Mapping[str, str], tmp_path: Path) -> None:
    job_id, target, link = jobs[NAMES[0]], tmp_path / "real.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    done = run(service, "export", job_id, "-o", str(link))
    assert (done.returncode, done.stdout) == (0, f"wrote {link} ({target.stat().st_size:,} bytes)\n".encode())
    content = target.read_bytes()
    for output in ("-", "/dev/stdout"):
        assert run(service, "export", job_id, "-o", output).stdout == content
    for wrong, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.csv", "does not exist")):
        done = run(service, "export", job_id, "-o", str(wrong))
        assert (done.returncode, words in done.stderr.decode(), done.stderr.count(b"\n")) == (2, True, 1)


def test_a_service_that_is_not_there_is_one_sentence(service: Served, tmp_path: Path) -> None:
    variables: dict[str, Any] = {"APT_JOBS_URL": "http://127.0.0.1:9", "APT_JOBS_DATA_DIR": str(tmp_path)}
    for arguments in (["ps"], ["logs", "-f", "job_x"]):
        done = run(service, *arguments, **variables)
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
        assert b"cannot be reached" in done.stderr
