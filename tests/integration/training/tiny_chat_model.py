"""A tiny model with a chat template, and data to fine-tune it on."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from apt_jobs.training.tokenizer import train_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CONTEXT = 128
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "ten", "red", "green", "blue", "一段", "文字")


def text(number: int, num_words: int) -> str:
    return " ".join(WORDS[(number * 7 + word * (1 + number % 5)) % len(WORDS)] for word in range(num_words))


def conversations(count: int) -> list[dict[str, Any]]:
    """One to three turns each, some with a system message."""
    found = []
    for number in range(count):
        messages = [{"role": "system", "content": text(number, 3)}] if number % 3 == 0 else []
        for turn in range(1 + number % 3):
            messages += [
                {"role": "user", "content": f"{text(number + turn, 4)}?"},
                {"role": "assistant", "content": f"{text(number + turn + 1, 2 + number % 6)}."},
            ]
        found.append({"messages": messages})
    return found


def completions(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{text(number, 5)}: ", "completion": text(number + 3, 3 + number % 7)} for number in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"{text(number, 4)}?"}],
            "chosen": [{"role": "assistant", "content": f"{text(number + 1, 3 + number % 4)}."}],
            "rejected": [{"role": "assistant", "content": f"{text(number + 5, 2 + number % 5)}!"}],
        }
        for number in range(count)
    ]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(" ".join(text(number, 20) for number in range(50)), 320, CONTEXT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write a Llama with random weights and its tokenizer."""
    tokenizer = chat_tokenizer(template)
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
