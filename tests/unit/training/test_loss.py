"""The chunked loss is the model's own, for every model that gets it; the others keep theirs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from apt_jobs.training import loss as loss_module
from apt_jobs.training.attention import use_causal_attention
from apt_jobs.training.loss import chunked_loss_of

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gpt2": GPT2Config(**GPT2_SIZES),
}


@pytest.mark.parametrize("chunk_logits", [1 << 27, 12 * VOCABULARY, 1])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_loss_and_gradients_are_those_of_the_model_itself(
    monkeypatch: pytest.MonkeyPatch, name: str, chunk_logits: int
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    model = _model(copy.deepcopy(CONFIGURATIONS[name]))
    ids = torch.randint(VOCABULARY, (3, 16))
    labels = ids.clone()
    labels[2, 5:] = -100
    expected = _loss_and_gradients(model, ids, labels)
    is_masked = name == "mistral"  # its window is shorter than the sequences
    assert use_causal_attention(model) is not is_masked
    assert chunked_loss_of(model) is not None
    torch.testing.assert_close(_loss_and_gradients(model, ids, labels), expected, rtol=1e-5, atol=1e-6)


def test_a_model_with_more_between_hidden_states_and_loss_keeps_its_own() -> None:
    sizes = {**SIZES, "head_dim": 8, "num_key_value_heads": 2}
    model = _model(Gemma2Config(**sizes))  # it caps its logits
    assert chunked_loss_of(model) is None
    assert not use_causal_attention(model)


def test_the_attention_of_a_training_is_not_saved_with_the_model(tmp_path: Any) -> None:
    model = _model(LlamaConfig(**SIZES))
    assert use_causal_attention(model)
    model.save_pretrained(tmp_path)
    assert "causal_sdpa" not in (tmp_path / "config.json").read_text()


def _model(config: PreTrainedConfig) -> Any:
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it untyped


def _loss_and_gradients(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    torch.autograd.backward(loss)
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
