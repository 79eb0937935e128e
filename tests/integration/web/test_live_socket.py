"""`/ws/jobs/{id}` of a real server: every event once and in order, whatever happens on the way."""

import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest
import redis
from websockets.exceptions import ConnectionClosed

from tests.integration.faulty_valkey import Valkey
from tests.integration.web.served import DEADLINE_S, Listener, Served, closed_with, until


def test_stored_events_come_first_and_live_ones_follow(served: Served) -> None:
    job_id = served.new_job()
    served.say_lines(job_id, 700)
    with served.connected(f"/ws/jobs/{job_id}") as connection:
        hello = orjson.loads(connection.recv(timeout=DEADLINE_S))
        assert (hello["head"], hello["job"]["id"], hello["layers"]) == (702, job_id, [])
        listener = Listener()
        listener.receive(connection, 702)
        for _ in range(20):
            listener.receive(connection, served.say_lines(job_id, 10))
    assert listener.seq == 902
    assert listener.messages[:3] == ["state", "state", "0 " + "x" * 40]


@pytest.mark.parametrize("after", [0, 1, 255, 256, 699, 702])
def test_a_client_resumes_where_it_was(served: Served, after: int) -> None:
    job_id = served.new_job()
    served.say_lines(job_id, 700)
    with served.connected(f"/ws/jobs/{job_id}?after={after}") as connection:
        Listener(after).receive(connection, served.say_lines(job_id, 3))


def test_a_client_from_the_future_gets_what_comes_after(served: Served) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}?after=20") as connection:
        served.say_lines(job_id, 10)
        Listener(20).receive(connection, served.say_lines(job_id, 30))


def test_a_silent_stream_tells_its_head(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_jobs.web.live.ring.HEARTBEAT_S", 1.0)
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}?after=2") as connection:
        assert orjson.loads(connection.recv(timeout=DEADLINE_S))["head"] == 2
        assert orjson.loads(connection.recv(timeout=DEADLINE_S)) == {"head": 2}


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "9" * 30, ""])
def test_a_wrong_place_is_refused(served: Served, after: str) -> None:
    with served.connected(f"/ws/jobs/{served.new_job()}?after={after}") as connection:
        assert closed_with(connection) == 4400


def test_an_unknown_job_is_refused(served: Served) -> None:
    with served.connected("/ws/jobs/job_none") as connection:
        assert closed_with(connection) == 4404


def test_what_a_client_says_is_dropped(served: Served) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}") as connection:
        for number in range(100):
            connection.send(f"hello {number}")
        Listener().receive(connection, served.say_lines(job_id, 3))


def test_a_burst_arrives_whole(served: Served) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}") as connection:
        last_seq = served.say_lines(job_id, 20_000)
        Listener().receive(connection, last_seq)


@pytest.mark.parametrize("fault", ["restart", "flush", "cut", "freeze"])
def test_a_fault_of_valkey_loses_nothing(served: Served, valkey: Valkey, fault: str) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}") as first, served.connected(f"/ws/jobs/{job_id}") as second:
        listeners = Listener(), Listener()
        with speaking(served, job_id) as last_seqs:
            for _ in range(2):
                if fault == "restart":
                    valkey.kill()
                    valkey.start()
                elif fault == "freeze":
                    valkey.send(signal.SIGSTOP)
                    listeners[0].receive(first, last_seqs[-1] if last_seqs else 0)
                    valkey.send(signal.SIGCONT)
                else:
                    client = redis.Redis.from_url(valkey.url)
                    client.flushall() if fault == "flush" else client.client_kill_filter(_type="pubsub")
                    client.close()
                listeners[0].receive(first, listeners[0].seq + 100)
        for listener, connection in zip(listeners, (first, second), strict=True):
            listener.receive(connection, last_seqs[-1])


def test_cut_sockets_and_a_restarted_service_lose_nothing(served: Served) -> None:
    job_id = served.new_job()
    listener = Listener()
    with speaking(served, job_id) as last_seqs:
        for number in range(6):
            with served.connected(f"/ws/jobs/{job_id}?after={listener.seq}") as connection:
                listener.receive(connection, listener.seq + 50)
                if number == 3:
                    served.stop()
                    served.start()
                else:
                    connection.socket.shutdown(socket.SHUT_RDWR)
    with served.connected(f"/ws/jobs/{job_id}?after={listener.seq}") as connection:
        listener.receive(connection, last_seqs[-1])


@pytest.mark.parametrize("served", ["direct"], indirect=True)  # a server of others frees its buffers when it likes
def test_a_client_that_does_not_read_is_told_to_resume_and_delays_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt_jobs.web.live.ring.STALL_S", 2.0)
    job_id = served.new_job()
    with (
        served.connected(f"/ws/jobs/{job_id}", max_queue=1) as lazy,
        served.connected(f"/ws/jobs/{job_id}") as other,
    ):
        lazy.recv(timeout=DEADLINE_S)
        listener = Listener()
        for _ in range(40):
            listener.receive(other, served.say_lines(job_id, 100, width=5_000))
        assert all(unsent <= 1 << 20 for unsent in served.unsent_bytes())
        until(lambda: len(served.unsent_bytes()) == 1)
        lazy_listener = Listener()
        with pytest.raises(ConnectionClosed) as caught:
            lazy_listener.receive(lazy, listener.seq)
        assert caught.value.rcvd is None or caught.value.rcvd.code == 4408
    with served.connected(f"/ws/jobs/{job_id}?after={lazy_listener.seq}") as again:
        lazy_listener.receive(again, listener.seq)


def test_clients_that_leave_at_once_leave_nothing_behind(served: Served) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}") as watching:
        listener = Listener()
        for _ in range(5):
            for _ in range(100):
                with asking(served, job_id):
                    pass
            listener.receive(watching, served.say_lines(job_id, 1))
        until(lambda: len(served.connections()) == 1)
        listener.receive(watching, served.say_lines(job_id, 1))


def test_a_socket_gets_nothing_for_the_one_that_had_its_number_before(served: Served) -> None:
    left, own = served.new_job(), served.new_job()
    with speaking(served, left) as left_seqs, speaking(served, own):
        until(lambda: left_seqs)
        for _ in range(50):
            with asking(served, left) as leaving:
                leaving.recv(100)
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
            with served.connected(f"/ws/jobs/{own}") as connection:
                hello = orjson.loads(connection.recv(timeout=DEADLINE_S))
                assert hello["job"]["id"] == own
                Listener().receive(connection, hello["head"] + 20)


@pytest.mark.parametrize("path", ["/ws/jobs", "/ws/jobs/{job_id}"])
def test_a_message_larger_than_a_limit_is_refused_by_its_length_alone(served: Served, path: str) -> None:
    with served.connected(path.format(job_id=served.new_job())) as connection:
        connection.socket.sendall(b"\x82\xff" + (100 << 20).to_bytes(8, "big") + bytes(4))  # of 100 MiB nothing follows
        assert closed_with(connection) == 1009


def test_the_direct_way_is_taken_where_there_is_one(served: Served, request: pytest.FixtureRequest) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}?after=2") as connection:
        connection.recv(timeout=DEADLINE_S)
        [protocol] = served.connections()
        is_direct = request.node.callspec.params["served"] == "direct"
        until(lambda: (getattr(protocol, "taker", None) is not None) == is_direct)
        assert not is_direct or protocol.taker.descriptor is not None
    until(lambda: not is_direct or protocol.taker.descriptor is None)  # the number of its socket is another's now


@contextmanager
def asking(served: Served, job_id: str) -> Iterator[socket.socket]:
    """A client that asks for a stream, and nothing more."""
    port = served.settings.port
    handshake = (
        f"GET /ws/jobs/{job_id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nAuthorization: Bearer {served.key}\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as asked:
        asked.sendall(handshake.encode())
        yield asked


@contextmanager
def speaking(served: Served, job_id: str) -> Iterator[list[int]]:
    """Events all the time, from a thread; the last `seq` of each batch."""
    last_seqs: list[int] = []
    stop = threading.Event()

    def speak() -> None:
        while not stop.wait(0.005):
            last_seqs.append(served.say_lines(job_id, 10))

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        yield last_seqs
    finally:
        stop.set()
        thread.join()
