"""Greedy text of each architecture, over slots or by the reference runner, is what its own `generate` says."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.probe import make_runner
from apt_jobs.generation.runner import SlotRunner
from apt_jobs.generation.scheduler import Scheduler
from apt_jobs.generation.sequences import Handle, Priority, SamplingParams, Sequence
from tests.unit.generation.tiny_model import tiny_tokenizer

VOCABULARY = 340
NUM_NEW = 14
PROMPT_LENGTHS = (1, 5, 5, 17, 30)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key in ("vocab_size", "initializer_range")},
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}
MAMBA |= {"state_size": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BY_SLOTS = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 8},
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 16},
    "gemma": {**SMALL, "head_dim": 16},
    "gemma2": {**SMALL, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SMALL, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi": {**SMALL, "num_key_value_heads": 4},
    "phi3": {**SMALL, "sliding_window": 8},
    "gpt2": GPT,
    "gpt_neox": SMALL,
    "mixtral": {**SMALL, **EXPERTS},
    "olmo2": SMALL,
    "stablelm": SMALL,
    "starcoder2": SMALL,
    "cohere": SMALL,
    "granite": SMALL,
    "gpt_oss": {**SMALL, **EXPERTS, "head_dim": 16, "sliding_window": 8},
}
BY_REFERENCE = {
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "gptj": {**GPT, "rotary_dim": 8},
    "lfm2": {**SMALL, "layer_types": ["conv", "full_attention"]},
    "jamba": {**SMALL, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba": MAMBA,
    "mamba2": {**MAMBA, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
    "rwkv": {**{key: value for key, value in SMALL.items() if key != "head_dim"}, "attention_hidden_size": 32},
    "recurrent_gemma": {
        **SMALL,
        "lru_width": 32,
        "attention_window_size": 8,
    },
    "dynamic-rope": {**SMALL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
}


def tiny(kind: str, fields: dict[str, Any]) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library's
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama" if kind == "dynamic-rope" else kind, **copy.deepcopy(fields))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # the library's
    model.eval()  # type: ignore[no-untyped-call]  # torch's
    return model


def loaded(kind: str, fields: dict[str, Any]) -> LoadedModel:
    return LoadedModel.of(Path(kind), tiny(kind, fields), tiny_tokenizer())


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def generated(model: PreTrainedModel, prompt: list[int], num_new: int = NUM_NEW) -> list[int]:
    output = model.generate(  # type: ignore[operator]  # typed as a module's attribute
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        do_sample=False,
        max_new_tokens=num_new,
        use_cache=False,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def run(scheduler: Scheduler, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        scheduler.submit(sequence)
    for _ in range(10_000):
        if not scheduler.has_work:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def sequence(prompt: list[int], handle: Handle | None = None, context: int = 64, **params: Any) -> Sequence:
    handle = handle or Handle()
    params = {"max_tokens": NUM_NEW, **params}
    return Sequence(prompt, SamplingParams(**params), context, handle.push, Priority.INTERACTIVE, group=object())


@pytest.mark.parametrize("kind", [*BY_SLOTS, *BY_REFERENCE])
def test_greedy_text_equals_generate(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expected = [generated(tiny(kind, (BY_SLOTS | BY_REFERENCE)[kind]), prompt) for prompt in prompts()]
    model = loaded(kind, (BY_SLOTS | BY_REFERENCE)[kind])
    runner = make_runner(model, max_rows=4, compile_graphs=False)
    assert isinstance(runner, SlotRunner) is (kind in BY_SLOTS), caplog.text
    sequences = [sequence(prompt) for prompt in prompts()]
    run(Scheduler(runner, kind, prefill_tokens=24, prefill_tokens_beside=7), sequences)
    assert [each.output_ids for each in sequences] == expected
    assert len({token for tokens in expected for token in tokens}) > 4, "the model is varied enough"
