"""The estimate of a rank's memory against what PyTorch keeps, and what is advised where it does not fit."""

from typing import Any

import pytest
import torch

from apt_jobs.jobs.memory import CONTEXT_BYTES, ModelShape, num_trainable, rank_memory
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.operations.preflight import advice_for
from apt_jobs.training.loss import chunked_loss_of
from apt_jobs.training.model import build_model

CONFIG = APTConfig(d_model=128, num_layers=2, num_attention_heads=4, vocab_size=1_000, max_seq_len=128)
SHAPE = ModelShape.of_config(CONFIG)
PARAMETERS = SHAPE.num_parameters


def _kept_bytes(*, is_mixed: bool) -> int:
    """Bytes that one forward pass of eight sequences keeps for the backward one."""
    model = build_model(CONFIG, CONFIG.vocab_size, 0).train()
    chunked_loss_of(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, CONFIG.vocab_size, (8, CONFIG.max_seq_len))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=is_mixed, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("is_mixed", [False, True])
def test_the_estimate_is_a_little_below_what_an_uncompiled_model_keeps(is_mixed: bool) -> None:
    options = TrainingOptions(batch_size=8, precision="bf16" if is_mixed else "fp32", compile="off")
    memory = rank_memory(SHAPE, options, 1, on_gpu=False)
    estimate = memory.activations + memory.logits + memory.other
    assert 0.75 < estimate / _kept_bytes(is_mixed=is_mixed) < 1.0


@pytest.mark.parametrize(
    ("fields", "num_ranks", "weights", "gradients", "optimizer"),
    [
        ({}, 1, 4, 4, 8),
        ({"optimizer": "lion"}, 1, 4, 4, 4),
        ({"precision": "bf16-true"}, 1, 2, 2, 4),
        ({"sharding": "fsdp2"}, 4, 1, 1, 2),
        ({"sharding": "fsdp2"}, 1, 4, 4, 8),
    ],
)
def test_what_is_kept_of_each_parameter_is_counted(
    fields: dict[str, Any], num_ranks: int, weights: int, gradients: int, optimizer: int
) -> None:
    memory = rank_memory(SHAPE, TrainingOptions(**fields), num_ranks, on_gpu=True)
    found = (memory.weights, memory.gradients, memory.optimizer)
    assert found == (weights * PARAMETERS, gradients * PARAMETERS, optimizer * PARAMETERS)
    assert memory.other >= CONTEXT_BYTES


def test_each_option_takes_or_saves_what_it_says() -> None:
    def total(num_ranks: int = 1, **fields: Any) -> int:
        return rank_memory(SHAPE, TrainingOptions.model_validate(fields), num_ranks, on_gpu=True).total

    assert total(ema_decay=0.9) == total() + 4 * PARAMETERS
    assert total(num_ranks=2) == total() + 4 * PARAMETERS  # buckets
    assert total(activation_checkpointing=True) < total()
    assert total(batch_size=4) < total(batch_size=8)
    assert total(objective="dpo", batch_size=4) == total(batch_size=8) + 4 * PARAMETERS
    assert total(compile="off") > total(compile="on")
    adapter = TrainingOptions.model_validate({"lora": {"r": 4}})
    assert num_trainable(SHAPE, adapter) < PARAMETERS / 10
    assert total(lora={"r": 4}) < total()


def test_what_would_fit_fits() -> None:
    model = {"d_model": 2_048, "num_layers": 16, "num_attention_heads": 16, "vocab_size": 32_000, "max_seq_len": 2_048}
    spec = TrainSpec.model_validate({"kind": "train", "model": model, "training": {"batch_size": 64}})
    shape = ModelShape.of_config(spec.model)
    [batch, checkpointing] = advice_for(spec, shape, 80 * 10**9)
    assert batch.startswith("batch_size=")
    size, accumulation = (int(part.rsplit("=", 1)[1]) for part in batch.split(" with "))
    assert size * accumulation == 64
    fitting = spec.training.model_copy(update={"batch_size": size})
    assert rank_memory(shape, fitting, 1, on_gpu=True).total <= 80 * 10**9
    assert checkpointing == "activation_checkpointing=true"
    assert advice_for(spec, shape, 16 * 10**9)[0].startswith(("batch_size=1 with act", 'precision="bf16-true"'))
    assert advice_for(spec, shape, 10**9) == [
        'a smaller model, an adapter (training.lora), or more ranks with sharding="fsdp2"'
    ]
