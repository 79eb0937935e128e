"""Text from tokens: whole characters, stop strings, and the end."""

import pytest
from transformers import PreTrainedTokenizerFast

from apt_jobs.generation.text import TextStream
from tests.unit.generation.tiny_model import SENTENCES, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def grown(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: list[str], prompt: str = "提示") -> TextStream:
    stream = TextStream(tokenizer, tokenizer.encode(prompt), stop)
    for token in tokens:
        if not stream.stopped:
            stream.push(token)
    return stream


@pytest.mark.parametrize("text", [*SENTENCES, "😀 naïve\n\t数据", "", " leading space"])
@pytest.mark.parametrize("stop", [[], ["never there"]])
def test_text_comes_back_as_it_was(tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]) -> None:
    assert grown(tokenizer, tokenizer.encode(text), stop).finish() == text


@pytest.mark.parametrize("stop", [[], ["never there"]])
def test_an_incomplete_character_at_the_end_is_left_out(tokenizer: PreTrainedTokenizerFast, stop: list[str]) -> None:
    tokens = tokenizer.encode("数据库")
    assert len(tokens) == 9, "each character takes several tokens"
    assert [grown(tokenizer, tokens[:num], stop).finish() for num in range(10)] == (
        ["", "", "", "数", "数", "数", "数据", "数据", "数据", "数据库"]
    )


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["doubled"], "The queue is the truth; a message is a hint that may be lost, "),
        (["truth", "queue"], "The "),
        (["; a m"], "The queue is the truth"),
        (["T"], ""),
    ],
)
def test_text_ends_before_the_first_stop_string(
    tokenizer: PreTrainedTokenizerFast, stop: list[str], expected: str
) -> None:
    stream = grown(tokenizer, tokenizer.encode(SENTENCES[0]), stop)
    assert stream.stopped
    assert stream.finish() == expected


def test_a_chinese_stop_string_is_found_across_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = grown(tokenizer, tokenizer.encode(SENTENCES[2]), ["数据库"])
    assert stream.finish() == "一个消息只是一个提示\uff0c"


def test_stop_strings_in_the_prompt_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = grown(tokenizer, tokenizer.encode("b"), ["ab"], prompt="aaa")
    assert stream.finish() == "b"
    assert not stream.stopped


@pytest.mark.parametrize("stop", [[], ["e"], ["the", "er t"], ["zzz"]])
def test_what_is_popped_is_the_whole_text_and_never_a_part_of_a_stop_string(stop: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("Rows join: 一个消息, so a short text waits; never the long one, zz")
    whole, stream = TextStream(tokenizer, [], stop), TextStream(tokenizer, [], stop, incremental=True)
    popped = []
    for token in tokens:
        whole.push(token)
        stream.push(token)
        popped.append(stream.pop())
        if stream.stopped:
            break
    assert stream.finish() == whole.finish()
    assert "".join([*popped, stream.pop()]) == whole.finish()
    assert stream.pop() == ""
