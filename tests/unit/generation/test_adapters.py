"""LoRA adapters that share one model: greedy text is that of the merged model, in any company, in bounded memory."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
)

from apt_jobs.errors import InvalidCheckpoint, NotFound, Unavailable
from apt_jobs.generation import adapters as adapters_module
from apt_jobs.generation.engine import Engine
from apt_jobs.jobs.lora_options import LoraOptions
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.training.adapters import WEIGHTS, add_adapter, write_adapter
from apt_jobs.training.model import load_model
from tests.unit.generation.requests import finish_after, spec
from tests.unit.generation.tiny_model import NEVER, save_model, tiny_tokenizer

TEXTS = ["The", "Rows join and leave", "x"]
SIZES: dict[str, Any] = {"vocab_size": 340, "bos_token_id": None, "eos_token_id": NEVER}


def write_lora(base: Path, folder: Path, seed: int, *, below: tuple[Path, ...] = (), **options: Any) -> Path:
    """Write an adapter that changes a lot, trained beside a base with the adapters below it."""
    torch.manual_seed(seed)
    model = load_model(base, below)
    add_adapter(model, LoraOptions(**{"r": 4, **options}), "base")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True)
    write_adapter(folder, model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    tiny_tokenizer().save_pretrained(folder)
    return folder


def merged_copy(base: Path, adapters: tuple[Path, ...], folder: Path) -> Path:
    """Write the model that an adapter makes of its base."""
    model: Any = load_model(base, adapters)
    shutil.copytree(base, folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> list[Path]:
    """Five adapters of the tiny model, of two ranks and two choices of layers. Read only."""
    room = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, Any]] = [{}, {"r": 12}, {"target_modules": ["q_proj", "down_proj"]}, {"use_rslora": True}, {}]
    return [write_lora(model_dir, room / f"adapter-{seed}", seed, **kind) for seed, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, loras: list[Path]) -> dict[Path, list[str]]:
    room = tmp_path_factory.mktemp("merged")
    engine = Engine(warm_models=1, device="cpu")
    found = {
        lora: engine.generate(merged_copy(model_dir, (lora,), room / lora.name), spec(*TEXTS)).outputs for lora in loras
    }
    found[model_dir] = engine.generate(model_dir, spec(*TEXTS)).outputs
    engine.close()
    assert len({tuple(texts) for texts in found.values()}) == len(found), "each adapter changes the texts"
    return found


@pytest.fixture
def sharing() -> Iterator[Engine]:
    engine = Engine(warm_models=1, device="cpu")
    yield engine
    engine.close()


def test_requests_of_several_adapters_share_one_model_and_a_batch(
    sharing: Engine, model_dir: Path, loras: list[Path], expected: dict[Path, list[str]]
) -> None:
    endless = sharing.submit(model_dir, spec("The", max_length=4_000), adapters=(loras[0],))
    asked = [
        (folder, sharing.submit(model_dir, spec(*TEXTS), adapters=() if folder == model_dir else (folder,)))
        for _ in range(2)
        for folder in [*loras, model_dir]
    ]
    for folder, request in asked:
        assert finish_after(request).outputs == expected[folder], folder.name
    endless.stop()
    assert sharing.model(model_dir).model is not None, "it was never unloaded for another one"
    assert set(sharing.warm_folders) == {model_dir, *loras}


def test_more_adapters_than_slots_take_turns(
    model_dir: Path, loras: list[Path], expected: dict[Path, list[str]]
) -> None:
    engine = Engine(warm_models=1, device="cpu", warm_adapters=2)
    asked = [(lora, engine.submit(model_dir, spec(*TEXTS), adapters=(lora,))) for _ in range(2) for lora in loras]
    stopped = engine.submit(model_dir, spec("x"), adapters=(loras[0],))
    stopped.stop()
    for lora, request in asked:
        assert finish_after(request).outputs == expected[lora], lora.name
    assert len(engine.warm_folders) == 3
    engine.close()


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (GPT2Config(**SIZES, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4), GPT2LMHeadModel),
        (
            OPTConfig(
                **SIZES,
                pad_token_id=1,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                init_std=0.4,
            ),
            OPTForCausalLM,
        ),
        (
            Lfm2Config(
                **SIZES,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                initializer_range=0.4,
                layer_types=["conv", "full_attention"],
            ),
            Lfm2ForCausalLM,
        ),
    ],
    ids=["gpt2", "opt", "convolutions"],
)
def test_other_kinds_of_model_are_shared_or_copied_and_right(
    sharing: Engine, tmp_path: Path, config: PretrainedConfig, model_class: Any
) -> None:
    base = save_model(tmp_path / "base", config, model_class)
    loras = [write_lora(base, tmp_path / f"adapter-{seed}", seed) for seed in range(2)]
    merged = [merged_copy(base, (lora,), tmp_path / f"merged-{lora.name}") for lora in loras]
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder) for folder in merged]
    asked = [sharing.submit(base, spec(*TEXTS), adapters=(lora,)) for lora in loras]
    for model, request in zip(models, asked, strict=True):
        tokens = tiny_tokenizer().encode(TEXTS[1])
        ids = torch.tensor([tokens])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        text = str(tiny_tokenizer().decode(output[0, len(tokens) :], skip_special_tokens=True))
        assert finish_after(request).outputs[1] == text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_an_adapter_upon_an_adapter(sharing: Engine, model_dir: Path, loras: list[Path], tmp_path: Path) -> None:
    upper = write_lora(model_dir, tmp_path / "upper", 9, below=(loras[1],), r=3)
    both = (loras[1], upper)
    expected = sharing.generate(merged_copy(model_dir, both, tmp_path / "merged"), spec(*TEXTS)).outputs
    assert sharing.submit(model_dir, spec(*TEXTS), adapters=both).future.result().outputs == expected
    assert set(sharing.warm_folders) == {model_dir, upper}


def test_what_cannot_share_is_merged_into_a_copy(model_dir: Path, tmp_path: Path) -> None:
    dora = write_lora(model_dir, tmp_path / "dora", 3, use_dora=True)
    expected = merged_copy(model_dir, (dora,), tmp_path / "merged")
    engine = Engine(warm_models=2, device="cpu")
    assert finish_after(engine.submit(model_dir, spec(*TEXTS), adapters=(dora,))).outputs == (
        engine.generate(expected, spec(*TEXTS)).outputs
    )
    engine.close()


def test_a_model_that_cannot_tell_rows_apart_gets_a_copy(
    model_dir: Path, loras: list[Path], expected: dict[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters_module, "relative_difference", lambda *_: 1.0)
    engine = Engine(warm_models=2, device="cpu")
    asked = [engine.submit(model_dir, spec(*TEXTS), adapters=(loras[0],)) for _ in range(3)]
    assert [finish_after(request).outputs for request in asked] == [expected[loras[0]]] * 3
    assert engine.warm_folders == [model_dir, loras[0]]
    engine.close()


def test_what_one_adapter_read_is_no_prefix_of_anothers(sharing: Engine, long_model_dir: Path, tmp_path: Path) -> None:
    loras = [write_lora(long_model_dir, tmp_path / f"adapter-{seed}", seed) for seed in range(2)]
    long = "Rows join and leave between tokens. " * 12
    answers = [
        [finish_after(sharing.submit(long_model_dir, spec(long, max_length=12), adapters=each)) for each in pairs]
        for pairs in [[(loras[0],), (loras[1],), ()]] * 2
    ]
    assert [answer.num_reused > 0 for answer in answers[1]] == [True] * 3
    assert [answer.num_reused for answer in answers[0]] == [0, 0, 0]
    assert [one.outputs for one in answers[0]] == [one.outputs for one in answers[1]]
    assert len({one.outputs[0] for one in answers[0]}) == 3


def test_embeddings_are_those_of_the_merged_model(
    sharing: Engine, model_dir: Path, loras: list[Path], tmp_path: Path
) -> None:
    asked = GenerateSpec(kind="generate", texts=[""], embed=["The", "x"])
    merged = merged_copy(model_dir, (loras[0],), tmp_path / "merged")
    right = [numbers(one) for one in sharing.generate(merged, asked).outputs]
    found = finish_after(sharing.submit(model_dir, asked, adapters=(loras[0],))).outputs
    assert [numbers(one) for one in found] == [pytest.approx(one, rel=1e-3, abs=1e-4) for one in right]


def numbers(encoded: str) -> list[float]:
    import base64

    return torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.float32).tolist()


def test_wrong_adapters_fail_alone(
    sharing: Engine, model_dir: Path, loras: list[Path], expected: dict[Path, list[str]], tmp_path: Path
) -> None:
    def changed(name: str) -> Path:
        return Path(shutil.copytree(loras[0], tmp_path / name))

    weights = load_file(loras[0] / WEIGHTS)
    cut = changed("cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:100])
    wide, foreign, lacking, diverged = changed("wide"), changed("foreign"), changed("lacking"), changed("diverged")
    save_file({name: torch.cat([one, one]).contiguous() for name, one in weights.items()}, wide / WEIGHTS)
    save_file({name.replace("layers.0", "layers.7"): one for name, one in weights.items()}, foreign / WEIGHTS)
    (lacking / WEIGHTS).unlink()
    save_file({name: torch.full_like(one, torch.nan) for name, one in weights.items()}, diverged / WEIGHTS)
    rank = changed("rank")
    config = json.loads((rank / "adapter_config.json").read_text())
    (rank / "adapter_config.json").write_text(json.dumps({**config, "r": 0}))
    cases = {
        cut: "cannot be read",
        wide: "does not fit its base model",
        foreign: "has no model.layers.7",
        lacking: "cannot be read",
        diverged: "NaN or infinity",
        rank: "cannot be read",
    }
    asked = {folder: sharing.submit(model_dir, spec("x"), adapters=(folder,)) for folder in cases}
    good = sharing.submit(model_dir, spec(*TEXTS), adapters=(loras[0],))
    for folder, words in cases.items():
        with pytest.raises(InvalidCheckpoint, match=words):
            finish_after(asked[folder])
    assert finish_after(good).outputs == expected[loras[0]]
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="cannot be read"):
        sharing.submit(model_dir, spec("x"), adapters=(tmp_path / "torn",))
    with pytest.raises(NotFound):
        sharing.submit(model_dir, spec("x"), adapters=(tmp_path / "absent",))


def test_memory_is_asked_for_before_an_adapter_is_placed(
    sharing: Engine,
    model_dir: Path,
    loras: list[Path],
    expected: dict[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish_after(sharing.submit(model_dir, spec("x"), adapters=(loras[0],)))
    monkeypatch.setattr(adapters_module, "free_bytes", lambda _: 0)
    assert finish_after(sharing.submit(model_dir, spec(*TEXTS), adapters=(loras[4],))).outputs == expected[loras[4]]
    assert set(sharing.warm_folders) == {model_dir, loras[4]}, "it took the place of one of its size"
    with pytest.raises(Unavailable, match="no memory for the adapter"):
        finish_after(sharing.submit(model_dir, spec("x"), adapters=(loras[1],)))
