"""Filters that cannot be read: one sentence each, never a traceback, whatever the text is."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.job_filter import (
    MAX_CHARS,
    MAX_TERMS,
    EqualTerm,
    LabelTerm,
    NumberTerm,
    TextTerm,
    WordTerm,
    parse_filter,
)


def test_each_kind_of_term_is_read() -> None:
    text = ' state:queued,running -label:team=a label:x lr>1e-3 "some text" training.optimizer!=lion eval/acc<=0.5 '
    assert parse_filter(text) == [
        WordTerm("state", ("queued", "running")),
        LabelTerm("team", "a", is_negated=True),
        LabelTerm("x", None),
        NumberTerm("training.learning_rate", ">", 1e-3),
        TextTerm("some text"),
        EqualTerm("training.optimizer", "lion", is_negated=True),
        NumberTerm("eval/acc", "<=", 0.5),
    ]
    assert parse_filter("  ") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x" * (MAX_CHARS + 1), "2,001 characters; at most"),
        ("a " * 21, "21 terms; at most 20"),
        ('"open', "a quote is not closed"),
        ('a "b', "a quote is not closed"),
        ('state:"', "a quote is not closed|cannot be read"),
        ("state:nope", "there is no state 'nope'; expected one of queued"),
        ("kind:x", "there is no kind"),
        ("state:,", "names nothing"),
        ("nope:x", "no field 'nope'"),
        ("label:=a", "names no label"),
        ("step>much", "expected a finite number"),
        ("step>nan", "expected a finite number"),
        ("step>inf", "expected a finite number"),
        ("loss=good", "expected a number, or a path"),
    ],
)
def test_a_filter_that_cannot_be_read_says_why(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        parse_filter(text)


@given(st.text(max_size=200) | st.text('ab:=<>!"-., \\x00', max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert len(parse_filter(text)) <= MAX_TERMS
