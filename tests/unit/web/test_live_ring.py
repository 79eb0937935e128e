"""How a ring hands a block to its watchers; of a socket that does not take all of it the rest goes another way."""

from collections.abc import Sequence

import pytest

from apt_jobs.web.live_blocks import Block, Form, View
from apt_jobs.web.live_outlets import Outlet
from apt_jobs.web.live_ring import Cursor, Ring

BLOCK = Block(first_seq=1, last_seq=3, frame=b"a whole frame", payload_at=2)


class NoHistory:
    """Nothing is stored."""

    async def blocks_after(self, view: View, job_id: str, seq: int, head: int) -> Sequence[Block]:
        return ()


class Told(Outlet):
    """What each way out was given; its socket takes `num_taken` bytes, or has an error."""

    def __init__(self, num_taken: int | None, *, is_direct: bool = True) -> None:
        super().__init__()
        self.written: list[Sequence[Block]] = []
        self.offered: list[bytes] = []
        self.rests: list[bytes] = []
        self._num_taken = num_taken
        if is_direct:
            self.offer = self._offer

    def write(self, blocks: Sequence[Block]) -> None:
        self.written.append(blocks)

    def write_rest(self, rest: bytes) -> None:
        self.rests.append(rest)

    def _offer(self, frame: bytes) -> int:
        self.offered.append(frame)
        if self._num_taken is None:
            raise BlockingIOError
        return self._num_taken


def handed_to(outlet: Told, *, is_ready: bool = True) -> Cursor:
    ring = Ring("job", View(Form.JSON), 0, NoHistory())
    cursor = Cursor(ring, outlet, 0)
    cursor.attach()
    outlet.ready = is_ready
    ring.append(BLOCK)
    return cursor


@pytest.mark.parametrize(
    ("num_taken", "rests"), [(13, []), (7, [b" frame"]), (0, [BLOCK.frame]), (None, [BLOCK.frame])]
)
def test_what_a_socket_does_not_take_is_handed_on(num_taken: int | None, rests: list[bytes]) -> None:
    outlet = Told(num_taken)
    assert handed_to(outlet).seq == 3
    assert (outlet.offered, outlet.rests, outlet.written) == ([BLOCK.frame], rests, [])


def test_without_a_plain_socket_the_outlet_writes() -> None:
    outlet = Told(13, is_direct=False)
    assert handed_to(outlet).seq == 3
    assert outlet.written == [(BLOCK,)]


def test_who_has_bytes_unsent_is_left_where_he_is() -> None:
    outlet = Told(13)
    assert handed_to(outlet, is_ready=False).seq == 0
    assert (outlet.offered, outlet.rests, outlet.written) == ([], [], [])
