"""The tokenizer: byte-level BPE trained on the data, so that any language survives a round trip."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from apt_jobs.errors import InvalidCheckpoint

EOS = "<|endoftext|>"
TRAINING_CHARS = 5_000_000  # of the documents that a vocabulary is learned from


def learn_vocabulary(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn at most `vocab_size` tokens (fewer if the texts have no more): all bytes, EOS and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, max_seq_len: int) -> PreTrainedTokenizerFast:
    """Return what a checkpoint saves, of a learned vocabulary."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=max_seq_len,
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(text: str, vocab_size: int, max_seq_len: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from one short text."""
    return wrap_tokenizer(learn_vocabulary([text], vocab_size), max_seq_len)


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
