"""What a validation says besides its loss: bytes of tokens, perplexity, bits per byte."""

import math

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apt_jobs.training.tokenizer import EOS, train_tokenizer
from apt_jobs.training.validation import Measured, token_bytes

TEXT = "words and 一段很短的文字, words and 😀 more words\n"


def test_the_tokens_of_a_text_have_the_bytes_of_the_text() -> None:
    tokenizer = train_tokenizer(TEXT * 20, 300, 32)
    counts = token_bytes(tokenizer)
    assert counts is not None
    ids = tokenizer.backend_tokenizer.encode(TEXT).ids
    assert counts[ids].sum() == len(TEXT.encode())
    assert counts[tokenizer.convert_tokens_to_ids(EOS)] == 0


def test_byte_fallback_counts_bytes_and_spaces() -> None:
    vocabulary = {"<unk>": 0, "▁words": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")  # type: ignore[no-untyped-call]
    counts = token_bytes(tokenizer)
    assert counts is not None
    assert counts[[0, 1, 2, 3, 258]].tolist() == [0, 6, 1, 1, 1]


def test_the_bytes_of_other_vocabularies_are_not_guessed() -> None:
    backend = Tokenizer(models.WordLevel({"words": 0}, unk_token="words"))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) is None  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("loss", "perplexity"), [(2.0, math.exp(2.0)), (1e6, math.inf), (math.inf, math.inf)])
def test_perplexity_is_e_to_the_loss(loss: float, perplexity: float) -> None:
    assert Measured(loss, 1.5).metrics("eval/wiki", is_cross_entropy=True) == {
        "eval/wiki/perplexity": perplexity,
        "eval/wiki/bits_per_byte": 1.5,
    }
    assert Measured(loss, None).metrics("validation", is_cross_entropy=False) == {}


def test_the_perplexity_of_a_broken_model_is_broken() -> None:
    assert math.isnan(Measured(math.nan, None).metrics("a", is_cross_entropy=True)["a/perplexity"])
