"""What is said on the token wire, what is too long for it, and what is no message of ours."""

import pytest

from apt_jobs.events.tokens import (
    MAX_MESSAGE_BYTES,
    End,
    GenerationResult,
    TokenMessage,
    decode_message,
    encode_message,
)


def result(output: str) -> GenerationResult:
    return GenerationResult(
        outputs=[output],
        model="tiny",
        generation_time_ms=1.0,
        num_tokens=[1],
        finish_reasons=["stop"],
        truncated=[False],
        usage={"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    )


def test_a_message_comes_back_as_it_was() -> None:
    message = TokenMessage(
        attempt=2, number=7, deltas=[(0, " 一"), (3, "x")], end=End(state="succeeded", result=result(" 一"))
    )
    assert decode_message(encode_message(message)) == message


def test_a_result_that_is_too_long_is_left_to_the_row() -> None:
    long = TokenMessage(attempt=1, number=0, end=End(state="succeeded", result=result("x" * MAX_MESSAGE_BYTES)))
    decoded = decode_message(encode_message(long))
    assert decoded is not None
    assert decoded.end == End(state="succeeded", result=None)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"attempt":1}',
        b'{"attempt":"1","number":0}',
        b'{"attempt":1,"number":0,"deltas":[[0]]}',
        b'{"attempt":1,"number":0,"end":{"state":"succeeded","result":{}}}',
    ],
)
def test_what_is_no_message_is_dropped(raw: bytes) -> None:
    assert decode_message(raw) is None
