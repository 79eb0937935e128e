"""LoRA: what is trained, what a checkpoint holds, that it resumes bit by bit, and that peft reads it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from apt_jobs.errors import InvalidCheckpoint, InvalidInput
from apt_jobs.events.kinds import LayersNamed, StepTrained, TrainingStarted
from apt_jobs.jobs.lora_options import LoraOptions
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training.adapters import add_adapter, load_adapter, merge_adapter
from apt_jobs.training.model import load_model
from apt_jobs.training.open_batches import open_batches
from apt_jobs.training.quantization import quantize_base
from tests.integration.training.one_rank import require_same_checkpoints, run_file_of, train_here
from tests.integration.training.test_training import events_of, launch
from tests.unit.generation.tiny_model import llama_config, save_model

# peft asks for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LORA: dict[str, Any] = {"r": 4, "alpha": 8.0, "dropout": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "qlora": {"quantization": "nf4"},
    "some": {"target_modules": ["q_proj", "mlp.down_proj"]},
}
HALF, LAST = "step-00000002-a1", "step-00000004-a1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", llama_config(initializer_range=0.05))


def run_of(folder: Path, base: Path, options: dict[str, Any] | None = None, **fields: Any) -> RunFile:
    options = {"lora": LORA, **(options or {})}
    spec = {"base_model": "tiny", "model": {"max_seq_len": 128}, "num_ranks": fields.pop("num_ranks", 1)}
    return run_file_of(folder, spec, options, base_model_dir=base, **fields)


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFile:
    """Four steps of each variant, checkpoints at 2 and 4."""
    options = {"lora": {**LORA, **VARIANTS[request.param]}}
    run_file = run_of(tmp_path_factory.mktemp("lora") / "whole", base, options)
    train_here(run_file)
    return run_file


def test_only_the_adapter_is_trained_and_watched(trained: RunFile) -> None:
    events = events_of(trained)
    started = next(event for event in events if isinstance(event, TrainingStarted))
    saved = load_file(trained.checkpoints_dir / LAST / "adapter_model.safetensors")
    assert started.num_trainable_parameters == sum(tensor.numel() for tensor in saved.values())
    assert started.num_trainable_parameters < started.num_parameters / 2
    named = next(event for event in events if isinstance(event, LayersNamed))
    assert len(named.names) == len(saved)
    assert all("lora_" in name for name in named.names)


def test_a_checkpoint_holds_the_adapter_and_what_a_resume_needs(trained: RunFile) -> None:
    folder = trained.checkpoints_dir / LAST
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "tokenizer.json"} <= names
    assert not names & {"model.safetensors", "config.json"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_a_resumed_adapter_ends_bitwise_where_the_whole_training_did(
    trained: RunFile, base: Path, tmp_path: Path
) -> None:
    options = trained.spec.training.model_dump(exclude_unset=True)
    resumed = run_of(tmp_path / "resumed", base, options, resume_dir=trained.checkpoints_dir / "step-00000002-a1")
    steps = [event.step for event in train_here(resumed) if isinstance(event, StepTrained)]
    assert steps == [3, 4]
    require_same_checkpoints(trained.checkpoints_dir / LAST, resumed.checkpoints_dir / LAST)


@torch.no_grad()
def test_peft_computes_the_same_with_it_and_so_does_the_merged_model(trained: RunFile, base: Path) -> None:
    folder = trained.checkpoints_dir / LAST
    ids = torch.arange(1, 21)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(ids).logits
    theirs = PeftModel.from_pretrained(plain, str(folder))
    expected = theirs(ids).logits
    assert not torch.allclose(before, expected, atol=1e-3)
    ours = load_model(base, [folder]).eval()
    assert not hasattr(ours, "peft_config")
    assert all(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_first_steps_are_those_of_peft_in_a_plain_loop(
    base: Path, tmp_path: Path, quantization: str | None
) -> None:
    """Loss of the first step: that of the base model; the update: AdamW's on peft's own layers."""
    lora = {**LORA, "dropout": 0.0, "quantization": quantization}
    run_file = run_of(tmp_path / "run", base, {"lora": lora, "max_steps": 3, "weight_decay": 0.0})
    losses = [event.train_loss for event in train_here(run_file) if isinstance(event, StepTrained)]
    expected = _plain_loop(run_file, base, lora)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[2] < losses[0]


def _plain_loop(run_file: RunFile, base: Path, lora: dict[str, Any]) -> list[float]:
    options = run_file.spec.training
    torch.manual_seed(options.seed)
    in_4_bits = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantization = {"quantization_config": in_4_bits} if lora["quantization"] else {}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, **quantization).train(),
        LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules="all-linear"),
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], betas=(options.beta1, options.beta2), weight_decay=0.0
    )
    batches = open_batches(run_file.run_dir, run_file.spec, 64, 1, can_pack=False)
    losses = []
    for step in (1, 2, 3):
        share = 0.5 * (1 + torch.cos(torch.tensor((step - 1) / 2 * torch.pi)).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (0.1 + 0.9 * share)
        ids = torch.cat([batch.ids_RT for batch in batches.micro_batches(step, 0)])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_ranks_train_one_adapter_and_resume_it_bitwise(base: Path, tmp_path: Path, sharding: str) -> None:
    options = {"sharding": sharding}
    whole = run_of(tmp_path / "whole", base, options, num_ranks=2)
    assert launch(whole) == 0, events_of(whole)
    folder = whole.checkpoints_dir / "step-00000002-a1"
    resumed = run_of(tmp_path / "resumed", base, options, num_ranks=2, resume_dir=folder)
    assert launch(resumed) == 0, events_of(resumed)
    require_same_checkpoints(whole.checkpoints_dir / LAST, resumed.checkpoints_dir / LAST)
    started = next(event for event in events_of(whole) if isinstance(event, TrainingStarted))
    saved = load_file(whole.checkpoints_dir / LAST / "adapter_model.safetensors")
    assert started.num_trainable_parameters == sum(tensor.numel() for tensor in saved.values())
    load_model(base, [whole.checkpoints_dir / LAST])


def test_an_adapter_upon_an_adapter_starts_from_the_merged_model(trained: RunFile, base: Path, tmp_path: Path) -> None:
    first = trained.checkpoints_dir / LAST
    run_file = run_of(tmp_path / "second", base, {"max_steps": 2}, base_adapter_dirs=[first])
    train_here(run_file)
    second = run_file.checkpoints_dir / "step-00000002-a1"
    both = load_model(base, [first, second])
    assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for p in load_model(base).parameters())


def test_a_frozen_half_of_an_adapter_is_saved_as_it_was(base: Path, tmp_path: Path) -> None:
    run_file = run_of(tmp_path / "half", base, {"freeze": ["*lora_A*"]})
    train_here(run_file)
    first, last = (load_file(run_file.checkpoints_dir / name / "adapter_model.safetensors") for name in (HALF, LAST))
    assert {name for name in first if torch.equal(first[name], last[name])} == {n for n in first if "lora_A" in n}
    load_adapter(load_model(base), run_file.checkpoints_dir / LAST)


def test_all_weights_can_be_trained_from_an_adapter(trained: RunFile, base: Path, tmp_path: Path) -> None:
    adapter = trained.checkpoints_dir / LAST
    run_file = run_of(tmp_path / "full", base, {"max_steps": 2, "lora": None}, base_adapter_dirs=[adapter])
    train_here(run_file)
    AutoModelForCausalLM.from_pretrained(run_file.checkpoints_dir / "step-00000002-a1")


@pytest.mark.parametrize("target", ["nope", "embed_tokens", "lm_head", "proj"])
def test_a_target_that_matches_nothing_is_refused_with_the_names_that_exist(base: Path, target: str) -> None:
    run_file_spec = {"r": 4, "target_modules": ["q_proj", target]}
    with pytest.raises(InvalidInput, match=rf"'{target}' matches no linear layer .*down_proj.*q_proj"):
        add_adapter(load_model(base), LoraOptions.model_validate(run_file_spec), "tiny")


def test_weights_of_another_adapter_are_refused(trained: RunFile, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    source = trained.checkpoints_dir / LAST
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    weights = load_file(source / "adapter_model.safetensors")
    first = sorted(weights)[0]
    for damaged in (
        {name: tensor for name, tensor in weights.items() if name != first},
        {**weights, "x": torch.zeros(1)},
        {**weights, first: torch.zeros(1, 1)},
    ):
        save_file(damaged, folder / "adapter_model.safetensors")
        with pytest.raises(InvalidCheckpoint, match="does not fit its base model in 1 weights"):
            load_adapter(load_model(base), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(InvalidCheckpoint, match="cannot be read"):
        load_adapter(load_model(base), folder)


def test_what_cannot_be_quantized_is_refused_in_words(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto: Any = AutoModelForCausalLM
    gpt2 = auto.from_config(AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(InvalidInput, match="no linear layer in GPT2LMHeadModel"):
        quantize_base(gpt2, torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(InvalidInput, match="pip install bitsandbytes"):
        quantize_base(load_model(base), torch.float32)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "mamba", "mixtral"])
def test_other_architectures_take_an_adapter(kind: str) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 1, "n_layer": 1, "n_head": 2}
    small |= {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    auto: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **small))
    ids = torch.arange(1, 9)[None]
    before = model.eval()(ids).logits
    add_adapter(model, LoraOptions(r=2), "tiny")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    changed = model(ids).logits
    assert not torch.allclose(before, changed, atol=1e-4)
    merge_adapter(model)
    tolerance = 1e-2 if kind == "mamba" else 1e-4  # of what the adapter changes: Mamba amplifies what is rounded
    assert (model(ids).logits - changed).norm() < tolerance * (changed - before).norm()
