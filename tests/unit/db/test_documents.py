"""Documents and texts of any origin become something that every database and every reader takes."""

import json
import math
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.db.documents import encode_document, storable_text

ANY_TEXT = st.text(st.characters(codec=None))  # lone surrogates included
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(ANY_TEXT)
def test_any_text_becomes_storable_and_keeps_its_length(text: str) -> None:
    storable = storable_text(text)
    assert "\0" not in storable
    assert len(storable.encode().decode()) == len(text)


@given(ANY_VALUE)
def test_any_document_is_strict_json(value: Any) -> None:
    encoded = encode_document(value)
    assert "\0" not in encoded
    orjson.loads(encoded)  # refuses NaN, Infinity and lone surrogates


@given(st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)))
def test_a_document_of_finite_numbers_is_unchanged(value: dict[str, float]) -> None:
    assert json.loads(encode_document(value)) == value


def test_broken_numbers_become_their_names() -> None:
    document = {"a": [math.nan, (math.inf, -math.inf)], "b": {"c": 1.5}}
    assert json.loads(encode_document(document)) == {"a": ["NaN", ["Infinity", "-Infinity"]], "b": {"c": 1.5}}
