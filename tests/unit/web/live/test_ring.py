"""How a ring hands a block to its watchers; of a socket that does not take all of it the rest goes another way."""

import socket
from collections.abc import Iterator, Sequence

import pytest

from apt_jobs.web.live.connections import Connection
from apt_jobs.web.live.frames import Block, Form, View
from apt_jobs.web.live.ring import Cursor, Ring

FRAME = b"a whole frame"
LARGE = bytes(16 << 20)  # more than a socket takes


class NoHistory:
    """Nothing is stored."""

    async def blocks_after(self, view: View, job_id: str, seq: int, head: int) -> Sequence[Block]:
        return ()


class Told(Connection):
    """What it was given to write, besides what went to its socket."""

    def __init__(self, descriptor: int | None) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.written: list[Block] = []
        self.rests: list[bytes] = []

    def write(self, blocks: Sequence[Block]) -> None:
        self.written += blocks

    def write_rest(self, rest: bytes) -> None:
        self.rests.append(rest)


@pytest.fixture
def ring() -> Ring:
    return Ring("job", View(Form.JSON), 0, NoHistory())


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server's and the client's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def watching(ring: Ring, descriptor: int | None) -> tuple[Cursor, Told]:
    connection = Told(descriptor)
    cursor = Cursor(ring, connection, ring.head)
    cursor.attach()
    return cursor, connection


def block(ring: Ring, frame: bytes = FRAME) -> Block:
    return Block(ring.head + 1, ring.head + 3, frame, 2)


def test_a_frame_goes_straight_to_a_socket(ring: Ring, sockets: tuple[socket.socket, socket.socket]) -> None:
    cursor, connection = watching(ring, sockets[0].fileno())
    ring.append(block(ring))
    assert (cursor.seq, sockets[1].recv(100), connection.written, connection.rests) == (3, FRAME, [], [])


def test_what_a_socket_does_not_take_goes_another_way(ring: Ring, sockets: tuple[socket.socket, socket.socket]) -> None:
    cursor, connection = watching(ring, sockets[0].fileno())
    ring.append(block(ring, LARGE))
    [rest] = connection.rests
    taken = 0
    while taken < len(LARGE) - len(rest):
        taken += len(sockets[1].recv(len(LARGE)))
    assert (cursor.seq, taken + len(rest)) == (3, len(LARGE))
    assert 0 < taken < len(LARGE)


def test_a_frame_for_a_broken_socket_goes_another_way(ring: Ring, sockets: tuple[socket.socket, socket.socket]) -> None:
    _, connection = watching(ring, sockets[0].fileno())
    sockets[1].close()
    ring.append(block(ring))
    assert connection.rests == [FRAME]


def test_without_a_plain_socket_the_connection_writes(ring: Ring) -> None:
    cursor, connection = watching(ring, None)
    first = block(ring)
    ring.append(first)
    assert (cursor.seq, connection.written) == (3, [first])


def test_who_has_bytes_unsent_gets_what_he_missed_when_they_are_gone(
    ring: Ring, sockets: tuple[socket.socket, socket.socket]
) -> None:
    cursor, connection = watching(ring, sockets[0].fileno())
    connection.paused()
    first = block(ring)
    ring.append(first)
    assert (cursor.seq, connection.written, connection.rests) == (0, [], [])
    connection.drained()
    assert (cursor.seq, connection.written) == (3, [first])
    ring.append(block(ring))  # straight again
    assert (cursor.seq, sockets[1].recv(100), connection.written) == (6, FRAME, [first])


def test_who_has_left_gets_nothing(ring: Ring, sockets: tuple[socket.socket, socket.socket]) -> None:
    cursor, connection = watching(ring, sockets[0].fileno())
    assert ring.is_watched
    cursor.detach()
    assert not ring.is_watched
    ring.append(block(ring))
    assert (cursor.seq, connection.written, connection.rests) == (0, [], [])
    with pytest.raises(BlockingIOError):
        sockets[1].recv(100)
