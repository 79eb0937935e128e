"""The built-in trainer with one NaN put into one rank's step: an entry point, as a user script is.

It sees the model only through hooks on all modules, and tells what became of the weights: `weights-RANK.json`.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training.loop import train
from apt_jobs.training.open_batches import open_batches
from apt_jobs.training.torchrun import read_rank_info


class Poison:
    """Waits for the first micro batch of one step, by its tokens; `arguments` of the job say what to do then."""

    def __init__(self, run_file: RunFile) -> None:
        self._run_file, self._arguments = run_file, run_file.spec.arguments
        self._batch: Tensor | None = None
        self._ddp: DistributedDataParallel | None = None
        self._is_now = False
        self._steps: list[str] = []  # digest of all weights before each step from the poisoned one on

    def before(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, DistributedDataParallel):
            self._ddp = module

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(module, nn.Embedding) and module.training:
            return self._embedded(inputs[0], output)
        is_block = type(module).__name__.endswith("DecoderLayer") and self._is_mine("nan_gradient")
        if is_block and module.self_attn.layer_idx == self._arguments["block"]:  # type: ignore[union-attr]  # Llama's
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(_spoilt)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return None

    def recorded(self) -> dict[str, Any]:
        """Return the weights before the poisoned step, after it and after the next one."""
        assert self._ddp is not None
        before, after, following = self._steps[:3]
        is_finite = all(bool(p.isfinite().all()) for p in self._ddp.parameters())
        return {"before": before, "after": after, "next": following, "is_finite": is_finite}

    def _embedded(self, ids: Tensor, embedded: Tensor) -> Tensor | None:
        """Count forward passes. The first micro batch of a step is one without a reduction."""
        assert self._ddp is not None
        self._is_now = torch.equal(ids, self._expected().to(ids.device))
        if (self._is_now or self._steps) and not self._ddp.require_backward_grad_sync:
            self._steps.append(self._digest())
        return _spoilt(embedded) if self._is_mine("nan_batch") else None

    def _expected(self) -> Tensor:
        if self._batch is None:
            spec, step = self._run_file.spec, int(self._arguments["step"])
            length = spec.model.max_seq_len
            batches = open_batches(self._run_file.run_dir, spec, length, spec.num_ranks, can_pack=False)
            self._batch = batches.micro_batches(step, read_rank_info().rank)[0].ids_RT
        return self._batch

    def _is_mine(self, fault: str) -> bool:
        return self._is_now and self._arguments["fault"] == fault and self._arguments["rank"] == read_rank_info().rank

    def _digest(self) -> str:
        assert self._ddp is not None
        digest = hashlib.sha256()
        for parameter in self._ddp.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def train_poisoned(run_file: RunFile, spool: SpoolWriter) -> None:
    """Train as the job says, with the fault that its arguments name."""
    poison = Poison(run_file)
    handles = [register_module_forward_pre_hook(poison.before), register_module_forward_hook(poison.after)]
    train(run_file, spool)
    for handle in handles:
        handle.remove()
    (run_file.run_dir / f"weights-{read_rank_info().rank}.json").write_text(json.dumps(poison.recorded()))


def _spoilt(values: Tensor) -> Tensor:
    """Put one NaN into the first sample."""
    poison = torch.zeros_like(values)
    poison[0, 0, 0] = torch.nan
    return values + poison
