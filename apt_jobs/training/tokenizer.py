"""The tokenizer: byte-level BPE trained on the data, so that any language survives a round trip."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from apt_jobs.errors import InvalidCheckpoint

EOS = "<|endoftext|>"
TRAINING_CHARS = 5_000_000  # of the text that the vocabulary is learned from
_CHUNK_CHARS = 10_000


def train_tokenizer(text: str, vocab_size: int, max_seq_len: int) -> PreTrainedTokenizerFast:
    """Learn at most `vocab_size` tokens (fewer if the text has no more): all bytes, EOS and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = text[:TRAINING_CHARS]
    chunks = (sample[start : start + _CHUNK_CHARS] for start in range(0, len(sample), _CHUNK_CHARS))
    tokenizer.train_from_iterator(chunks, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=max_seq_len,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a checkpoint or a local model.

    Raises:
        InvalidCheckpoint: there is none that can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise InvalidCheckpoint(f"the tokenizer of {folder.name!r} cannot be loaded: {exc}") from exc
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InvalidCheckpoint(f"{folder.name!r} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text of any length, without special tokens."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    pieces = [text[start : start + _CHUNK_CHARS] for start in range(0, len(text), _CHUNK_CHARS)]
    return [token for piece in backend.encode_batch_fast(pieces, add_special_tokens=False) for token in piece.ids]
