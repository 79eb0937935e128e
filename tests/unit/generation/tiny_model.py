"""Tiny models for the tests: random weights, a byte-level BPE tokenizer trained on a few sentences, in real folders."""

import hashlib
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

SENTENCES = [
    "The queue is the truth; a message is a hint that may be lost, doubled, late or forged.",
    "Rows join and leave between tokens, so a short text never waits for a long one.",
    "一个消息只是一个提示\uff0c数据库才是真相。训练从不等待网络。",
]
CONTEXT_TOKENS = 64
END = "<|end|>"
NEVER = 339  # an end token that the models here never say


def tiny_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """About 400 tokens; Chinese characters take up to three each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES[:2], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # the library's
        tokenizer_object=tokenizer, eos_token=END, bos_token=END if bos else None, clean_up_tokenization_spaces=False
    )


def llama_config(**changes: object) -> LlamaConfig:
    """A random Llama whose greedy texts are varied: the initial weights are large."""
    fields: dict[str, object] = {
        "vocab_size": 340,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_TOKENS,
        "initializer_range": 0.4,
        "eos_token_id": NEVER,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**fields, **changes})  # type: ignore[arg-type]  # fields of many types


def save_model(
    folder: Path, config: PretrainedConfig, model_class: type[PreTrainedModel] = LlamaForCausalLM, *, seed: int = 1
) -> Path:
    """Write a model with random weights, its tokenizer included."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library's
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[[0, NEVER]] = 0.0  # type: ignore[operator]  # typed as any module's
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_manifest(folder: Path) -> None:
    """The list of files that makes a folder a checkpoint."""
    files = {
        file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size_bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
