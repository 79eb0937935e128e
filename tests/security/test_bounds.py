"""Requests that are meant to hold or fill the server: each has an answer or an end in time, and others are served."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from apt_jobs.db.access import Role
from apt_jobs.web.api.json_text import nests_deeper
from apt_jobs.web.server.http_protocol import MAX_HEAD_BYTES, SPARE_CONNECTIONS
from tests.security.attacked import AttackedWeb, attacked_web, read_to_end, status_of

PATIENCE_S = 2.0  # APT_JOBS_REQUEST_TIMEOUT_S of the attacked process
END_DEADLINE_S = 20.0
MAX_CONNECTIONS = 20
TOO_MANY = 4503


@pytest.fixture
def small(valkey_server_url: str, tmp_path: Path) -> Iterator[AttackedWeb]:
    """A process with room for few connections."""
    with attacked_web(tmp_path, valkey_server_url, APT_JOBS_MAX_CONNECTIONS=str(MAX_CONNECTIONS)) as started:
        yield started


@pytest.fixture(autouse=True)
def _still_serves(web: AttackedWeb) -> Iterator[None]:
    yield
    assert web.serves()


def test_half_sent_requests_are_ended(web: AttackedWeb) -> None:
    whole = web.request_head("POST", "/api/jobs", {"content-length": "10", "content-type": "application/json"})
    with contextlib.ExitStack() as stack:
        sockets = []
        for number in range(300):
            connection = stack.enter_context(web.connect())
            connection.sendall(whole[: number * len(whole) // 300])
            sockets.append(connection)
        assert web.serves()
        answers = [status_of(_read_until_the_end(connection)) for connection in sockets]
    assert set(answers) <= {0, 408}
    assert answers.count(408) > 200


def test_a_head_that_drips_is_ended(web: AttackedWeb) -> None:
    with web.connect() as connection:
        began_s = time.monotonic()
        connection.sendall(b"GET / HTTP/1.1\r\n")
        connection.settimeout(0.1)
        while (answer := _drip(connection, b"x-a: b\r\n")) is None:
            assert time.monotonic() - began_s < END_DEADLINE_S
    assert status_of(answer) in (0, 408)


def test_a_second_request_on_a_connection_has_no_more_time(web: AttackedWeb) -> None:
    head = web.request_head("GET", "/healthz", {"connection": "keep-alive"})
    with web.connect() as connection:
        connection.sendall(head + head[:40])
        answer = _read_until_the_end(connection)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"HTTP/1.1 408" in answer


def test_a_body_that_nobody_wants_ends_the_connection(web: AttackedWeb) -> None:
    with web.connect() as connection:
        connection.sendall(web.request_head("GET", "/healthz", {"content-length": "1000000", "connection": "x"}))
        connection.settimeout(0.1)
        began_s = time.monotonic()
        while _drip(connection, b"x") != b"":
            assert time.monotonic() - began_s < END_DEADLINE_S


def test_a_body_that_drips_is_given_up(web: AttackedWeb) -> None:
    with web.connect() as connection:
        head = web.request_head("POST", "/api/jobs", {"content-length": "1000", "content-type": "application/json"})
        connection.sendall(head)
        connection.settimeout(0.1)
        began_s = time.monotonic()
        while (answer := _drip(connection, b" ")) is None:
            assert time.monotonic() - began_s < END_DEADLINE_S
    assert status_of(answer) == 408


def test_a_client_that_does_not_read_is_ended(web: AttackedWeb) -> None:
    head = web.request_head("GET", "/openapi.json", {"connection": "keep-alive"})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", web.settings.port))
        connection.settimeout(0.2)
        _send_until_ended(connection, head)


def test_a_head_without_end_is_refused(web: AttackedWeb) -> None:
    with web.connect() as connection:
        sent = _send_until_closed(connection, b"GET / HTTP/1.1\r\nx: ", b"a" * 4096, 64 << 20)
    assert sent < MAX_HEAD_BYTES + (8 << 20)  # what the sockets themselves hold


@pytest.mark.parametrize("piece_bytes", [1 << 20, 16_384, 1_000])
@pytest.mark.parametrize(
    "fields",
    [
        {"x": "a" * 70_000},
        {"x": "a" * 65_530},
        {f"x-{number}": "a" * 280 for number in range(250)},
        {f"x{number}": "" for number in range(300)},
        {"cookie": "; ".join(f"c{number}=1" for number in range(10_000))},
        {"x" * 70_000: "a"},
    ],
    ids=["one giant", "just over", "many", "many short", "cookies", "a long name"],
)
def test_a_large_head_is_refused_however_it_is_cut(web: AttackedWeb, fields: dict[str, str], piece_bytes: int) -> None:
    head = web.request_head("GET", "/healthz", fields)
    with web.connect() as connection:
        for start in range(0, len(head), piece_bytes):
            try:
                connection.sendall(head[start : start + piece_bytes])
            except ConnectionError:
                break
        assert status_of(_read_until_the_end(connection)) == 431


def test_a_head_below_the_limit_is_answered(web: AttackedWeb) -> None:
    assert status_of(web.raw(web.request_head("GET", "/healthz", {"x": "a" * 60_000}))) == 200


@pytest.mark.parametrize("target", ["/" + "a" * 200_000, "/?" + "a" * 200_000, "/api/jobs?" + "state=queued&" * 20_000])
def test_an_address_without_end_is_refused(web: AttackedWeb, target: str) -> None:
    assert status_of(web.raw(web.request_head("GET", target))) in (0, 431)


def test_a_huge_body_is_refused_before_it_is_read(web: AttackedWeb) -> None:
    headers = {"content-length": str(300 << 20), "content-type": "application/json"}
    began_s = time.monotonic()
    answer = web.raw(web.request_head("POST", "/api/jobs", headers))
    assert status_of(answer) == 413
    assert time.monotonic() - began_s < END_DEADLINE_S


def test_a_huge_body_in_chunks_is_not_kept(web: AttackedWeb) -> None:
    headers = {"transfer-encoding": "chunked", "content-type": "application/json"}
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    before = _memory_bytes(web)
    with web.connect() as connection:
        _send_until_closed(connection, web.request_head("POST", "/api/jobs", headers), chunk, 300 << 20)
    assert _memory_bytes(web) - before < 64 << 20


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 30, "1, 1", " ", "+5"])
def test_a_strange_length_is_refused(web: AttackedWeb, length: str) -> None:
    headers = {"content-length": length, "content-type": "application/json"}
    assert status_of(web.raw(web.request_head("POST", "/api/jobs", headers))) in (400, 413, 415)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"kind":"train","labels":' + b"[" * 1_000 + b"]" * 1_000 + b"}",
        b"[]" * 2_000_000,
        b'"' + b"\\" * 4_000_000,
        b"[" + b"1," * 2_000_000 + b"1]",
        b'{"kind":"train","num_ranks":' + b"9" * 1_000_000 + b"}",
    ],
    ids=["open", "objects", "100,000 deep", "deep objects", "in a field", "pairs", "escapes", "wide", "long number"],
)
def test_json_that_hurts_parsers_has_a_quick_answer(web: AttackedWeb, body: bytes) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        began_s = time.monotonic()
        answer = client.post("/api/jobs", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422)
        assert time.monotonic() - began_s < 5.0


@pytest.mark.parametrize(
    ("document", "depth"),
    [(b"1", 0), (b"[]", 1), (b"[{}]", 2), (b'{"a": [[], {"b": []}]}', 4), (b'["[[[[[{{{"]', 1), (b'["\\"[", "[["]', 1)],
)
def test_nesting_is_counted_outside_strings(document: bytes, depth: int) -> None:
    assert nests_deeper(document, depth - 1) == (depth > 0)
    assert not nests_deeper(document, depth)


def test_ten_thousand_ranges_are_answered_once(web: AttackedWeb) -> None:
    ranges = ",".join(f"{start}-{start + 5000}" for start in range(0, 10_000))
    for path in ("/favicon.svg", "/", "/assets/x"):
        answer = web.raw(web.request_head("GET", path, {"range": f"bytes={ranges[:60_000]}"}))
        assert status_of(answer) in (200, 206, 400, 404, 416, 503)
        assert len(answer) < 1 << 20


def test_many_faults_have_a_short_answer(web: AttackedWeb) -> None:
    body = b'{"kind": "train", ' + b",".join(b'"field%d": 1' % number for number in range(100_000)) + b"}"
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = client.post("/api/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["errors"][-1]["detail"] == "and 99,900 more"
    assert len(answer.content) < 1 << 16


def test_a_crowd_that_sends_nothing_takes_no_place_from_others(web: AttackedWeb) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(web.connect()) for _ in range(600)]
        assert web.serves()
        idle += [stack.enter_context(web.connect()) for _ in range(1_070)]
        for _ in range(5):
            assert status_of(web.raw(web.request_head("GET", "/healthz"))) == 200
            assert web.serves()
        dropped = sum(_is_over(connection) for connection in idle)
    assert dropped >= len(idle) - web.settings.max_connections_per_address


def test_a_crowd_without_a_key_leaves_a_reserve(small: AttackedWeb) -> None:
    """Whoever asks for the page and does not read the answer holds a place, but not the last ones."""
    with contextlib.ExitStack() as stack:
        waiting = b"POST /healthz HTTP/1.1\r\nhost: %b\r\ncontent-length: 9\r\n\r\n" % small.host.encode()
        for _ in range(3 * MAX_CONNECTIONS):
            stack.enter_context(small.connect()).sendall(waiting)
        assert small.serves()


def test_one_key_has_its_own_limit(valkey_server_url: str, tmp_path: Path) -> None:
    with attacked_web(tmp_path, valkey_server_url, APT_JOBS_MAX_CONNECTIONS_PER_KEY="5") as limited:
        slow = limited.request_head("POST", "/api/jobs", {"content-length": "9", "content-type": "application/json"})
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(limited.connect()).sendall(slow)
            with limited.client(limited.keys[Role.ADMIN]) as client:
                statuses = {client.get("/api/jobs").status_code for _ in range(20)}
            assert 429 in statuses
            with limited.client(limited.keys[Role.VIEWER]) as other:
                assert other.get("/api/jobs").status_code == 200
        assert limited.serves()


def test_pipelined_requests_are_all_answered(web: AttackedWeb) -> None:
    one = web.request_head("GET", "/healthz", {"connection": "keep-alive"})
    answer = web.raw(one * 500 + web.request_head("GET", "/healthz"))
    assert answer.count(b"HTTP/1.1 200") == 501


def test_more_connections_than_there_is_room_for_are_told_so(small: AttackedWeb) -> None:
    headers = {"authorization": f"Bearer {small.keys[Role.ADMIN]}"}
    slow = small.request_head("POST", "/api/jobs", {"content-length": "9", "content-type": "application/json"})
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(small.connect()) for _ in range(MAX_CONNECTIONS)]
        for connection in held:
            connection.sendall(slow)
        answer = small.raw(small.request_head("GET", "/api/jobs"))
        assert (status_of(answer), b"retry-after" in answer) == (503, True)
        assert status_of(small.raw(small.request_head("GET", "/healthz"))) == 200
        with (
            connect(f"ws://{small.host}/ws/jobs/x", additional_headers=headers, proxy=None) as websocket,
            pytest.raises(ConnectionClosed) as caught,
        ):
            websocket.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == TOO_MANY
        assert [status_of(_read_until_the_end(connection)) for connection in held] == [408] * MAX_CONNECTIONS
    assert small.serves()


def test_idle_connections_are_bounded_in_number_and_time(small: AttackedWeb) -> None:
    most = MAX_CONNECTIONS + SPARE_CONNECTIONS

    async def open_many() -> int:
        opened = [await asyncio.open_connection("127.0.0.1", small.settings.port) for _ in range(most + 100)]
        await asyncio.sleep(PATIENCE_S / 4)
        alive = sum(not reader.at_eof() for reader, _ in opened)
        for reader, _ in opened:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), END_DEADLINE_S)
        for _, writer in opened:
            writer.close()
        return alive

    assert asyncio.run(open_many()) <= most
    assert small.serves()


def _drip(connection: socket.socket, data: bytes) -> bytes | None:
    """Send a little; None: nothing came back; b"": the connection is over."""
    try:
        connection.sendall(data)
        answer = connection.recv(1 << 16)
    except TimeoutError:
        return None
    except ConnectionError:
        return b""
    return answer if b" 200 " not in answer else None


def _send_until_ended(connection: socket.socket, data: bytes) -> None:
    """Send without reading until the peer resets the connection."""
    began_s = time.monotonic()
    while True:
        try:
            connection.sendall(data)
        except TimeoutError:  # it has so much to answer that it does not listen
            assert time.monotonic() - began_s < END_DEADLINE_S
        except ConnectionError:
            return


def _is_over(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def _read_until_the_end(connection: socket.socket) -> bytes:
    connection.settimeout(END_DEADLINE_S)
    return read_to_end(connection)


def _send_until_closed(connection: socket.socket, head: bytes, part: bytes, most_bytes: int) -> int:
    sent = 0
    try:
        connection.sendall(head)
        while sent < most_bytes:
            connection.sendall(part)
            sent += len(part)
    except ConnectionError:
        pass
    return sent


def _memory_bytes(web: AttackedWeb) -> int:
    status = Path(f"/proc/{web.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024
