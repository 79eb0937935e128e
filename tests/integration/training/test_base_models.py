"""What a training may start from: kinds of model, and weights that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.events.kinds import StepTrained
from apt_jobs.training.data import Batch
from apt_jobs.training.model import load_model
from apt_jobs.training.objectives import NextToken, has_expert_balance
from tests.integration.training.one_rank import require_same_checkpoints, run_file_of, train_here
from tests.unit.generation.tiny_model import llama_config, save_model, tiny_tokenizer

SMALL: dict[str, Any] = {
    **{"vocab_size": 340, "hidden_size": 32, "n_embd": 32, "intermediate_size": 32, "d_model": 32, "d_ff": 32},
    **{"num_hidden_layers": 1, "n_layer": 1, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1},
    **{"num_attention_heads": 2, "n_head": 2, "num_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "max_position_embeddings": 64, "is_decoder": False, "router_aux_loss_coef": 0.5},
}


def config_of(kind: str) -> PretrainedConfig:
    fields = {key: value for key, value in SMALL.items() if key != "is_decoder" or kind in ("bert", "gpt_neox")}
    config: PretrainedConfig = AutoConfig.for_model(kind, **fields)
    return config


def saved(folder: Path, kind: str, auto: Any = AutoModelForCausalLM) -> Path:
    torch.manual_seed(5)
    auto.from_config(config_of(kind)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bloom", "mamba", "mixtral", "gpt_neox"])
def test_other_architectures_train_and_resume_bitwise(tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path / "base", kind)
    spec = {"base_model": "base", "model": {"max_seq_len": 32}}
    whole = run_file_of(tmp_path / "whole", spec, {}, base_model_dir=base)
    losses = [event.train_loss for event in train_here(whole) if isinstance(event, StepTrained)]
    assert losses[-1] < losses[0]
    middle = whole.checkpoints_dir / "step-00000002-a1"
    resumed = run_file_of(tmp_path / "resumed", spec, {}, base_model_dir=base, resume_dir=middle)
    train_here(resumed)
    last = "step-00000004-a1"
    require_same_checkpoints(whole.checkpoints_dir / last, resumed.checkpoints_dir / last)


@pytest.mark.parametrize(
    ("kind", "auto", "words"),
    [
        ("t5", AutoModelForSeq2SeqLM, "of type 't5', which is no causal language model"),
        ("bart", AutoModelForSeq2SeqLM, "of type 'bart', which is no causal language model"),
        ("bert", AutoModelForCausalLM, "sees the tokens after each one"),
        ("vit", AutoModel, "of type 'vit', which is no causal language model"),
    ],
)
def test_models_that_are_not_causal_are_refused_in_words(tmp_path: Path, kind: str, auto: Any, words: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"{words}.*choose one that continues text"):
        load_model(saved(tmp_path / kind, kind, auto))


def test_a_base_model_that_lacks_weights_or_has_others_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny", llama_config())
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in whole.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InvalidCheckpoint, match=f"lacks 1 weights .*first {name}"):
        load_model(folder)
    save_file({**whole, name: whole[name][:3].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match="'tiny'"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InvalidCheckpoint, match=r"lacks \d+ weights .*layers\.2"):
        load_model(folder)


def test_experts_are_balanced_in_training_and_not_in_validation() -> None:
    """The auxiliary loss by hand, for one layer: experts times the sum of share and mean probability of each."""
    torch.manual_seed(3)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config_of("mixtral")).eval()
    assert has_expert_balance(model)
    ids = torch.randint(1, 340, (2, 16))
    batch = Batch(ids, ids, None, 1)
    output = model(input_ids=ids, output_router_logits=True)
    plain = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    probabilities = output.router_logits[0].softmax(-1)
    chosen = F.one_hot(probabilities.topk(2, -1).indices, 4).float()
    balance = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
    objective = NextToken(balances_experts=True)
    torch.testing.assert_close(objective(model, batch), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective(model.train(), batch), plain + 0.5 * balance, rtol=1e-5, atol=1e-5)
