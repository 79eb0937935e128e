"""Blocks: whole WebSocket frames that any client reads, with contiguous events inside."""

from collections.abc import Generator
from datetime import UTC, datetime
from itertools import pairwise

import orjson
import pytest
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from apt_jobs.events.codec import FRAME_BYTES, encode_frame, encode_stored
from apt_jobs.events.kinds import LineLogged, StoredEvent
from apt_jobs.web.live.frames import View, batch_of, batches_of, blocks_of, framed


def encoded(seq: int, width: int = 10) -> bytes:
    return encode_stored(StoredEvent("job_a", seq, 1, datetime.now(UTC), LineLogged("info", "rank 0", "x" * width)))


def parsed(data: bytes) -> Frame:
    """What the `websockets` library reads from the wire."""
    reader = StreamReader()
    reader.feed_data(data)
    parsing: Generator[None, None, Frame] = Frame.parse(reader.read_exact, mask=False)
    try:
        next(parsing)
    except StopIteration as end:
        frame: Frame = end.value
        return frame
    raise AssertionError("the frame is not complete")


@pytest.mark.parametrize("length", [0, 1, 125, 126, 65_535, 65_536, 1 << 20])
@pytest.mark.parametrize("is_text", [True, False])
def test_frames_are_what_a_client_expects(length: int, is_text: bool) -> None:
    data, payload_at = framed(b"x" * length, is_text=is_text)
    frame = parsed(data)
    assert (frame.opcode, frame.fin, len(frame.data)) == (Opcode.TEXT if is_text else Opcode.BINARY, True, length)
    assert data[payload_at:] == frame.data


def test_batches_are_merged_up_to_a_limit_and_stay_contiguous() -> None:
    batches = list(batches_of(5, [encoded(5 + number, width=3000) for number in range(100)]))
    assert all(len(batch.raw) <= FRAME_BYTES + 100 for batch in batches)
    small = [batch_of(encode_frame(105 + number, [encoded(105 + number)])) for number in range(50)]
    blocks = blocks_of(View(), "job_a", [*batches, *small])
    assert len(blocks) < len(batches) + 3
    assert [blocks[0].first_seq, blocks[-1].last_seq] == [5, 154]
    assert all(before.last_seq + 1 == after.first_seq for before, after in pairwise(blocks))
    for block in blocks:
        frame = orjson.loads(block.payload)
        assert (frame["first_seq"], frame["count"]) == (block.first_seq, len(frame["events"]))
        assert [event["seq"] for event in frame["events"]] == list(range(block.first_seq, block.last_seq + 1))


def test_a_larger_event_stays_alone() -> None:
    sizes = [10, 10, FRAME_BYTES * 2, 10]
    batches = list(batches_of(1, [encoded(1 + number, width) for number, width in enumerate(sizes)]))
    assert [(batch.first_seq, batch.last_seq) for batch in batches] == [(1, 2), (3, 3), (4, 4)]


def test_a_view_that_names_its_job_says_so_in_each_frame() -> None:
    [block] = blocks_of(View(names_job=True), "job_a", list(batches_of(1, [encoded(1)])))
    assert orjson.loads(block.payload)["job_id"] == "job_a"
