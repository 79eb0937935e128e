"""What is minimized: the cross entropy of labels, or the loss of direct preference optimization.

Shapes: P pairs, R = 2 P rows (all chosen answers, then all rejected ones), T tokens, V vocabulary.
"""

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training.data import Batch
from apt_jobs.training.model import load_base
from apt_jobs.training.sequences import IGNORED_LABEL


class Objective(Protocol):
    """The mean loss of a micro batch (scalar)."""

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor: ...


class NextToken:
    """The cross entropy of the labels, as the model computes it.

    In training a mixture of experts adds what keeps its experts in even use (Fedus et al. 2021, equation 4), in the
    share that its configuration names.
    """

    def __init__(self, *, balances_experts: bool = False) -> None:
        self._balances_experts = balances_experts

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        options = _positions(batch)
        if self._balances_experts and module.training:
            options["output_router_logits"] = True
        loss: Tensor = module(input_ids=batch.ids_RT, labels=batch.labels_RT, use_cache=False, **options).loss
        return loss


def has_expert_balance(model: nn.Module) -> bool:
    """Return whether the model is a mixture of experts that can compute how evenly they are used."""
    coefficient = getattr(model.config, "router_aux_loss_coef", None)
    return bool(coefficient) and "output_router_logits" in inspect.signature(model.forward).parameters


class DirectPreference:
    """Prefer chosen answers to rejected ones (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    The reference is a frozen copy of the model that the job starts from, beside it on the device.
    """

    def __init__(self, reference: nn.Module, beta: float) -> None:
        self._reference, self._beta = reference, beta

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            reference_R = answer_log_probs(self._reference, batch)
        ratios_R = answer_log_probs(module, batch) - reference_R
        chosen_P, rejected_P = ratios_R.chunk(2)
        is_counted_P = (batch.labels_RT.chunk(2)[0] != IGNORED_LABEL).any(
            1
        )  # validation fills up with rows that do not
        losses_P = -F.logsigmoid(self._beta * (chosen_P - rejected_P))
        return losses_P[is_counted_P].mean()


def make_objective(run_file: RunFile, model: nn.Module, device: torch.device) -> Objective:
    """Return what a job minimizes.

    Raises:
        InvalidCheckpoint: its reference model cannot be loaded.
    """
    options = run_file.spec.training
    if options.objective == "next_token":
        return NextToken(balances_experts=has_expert_balance(model))
    reference = load_base(run_file).to(device).requires_grad_(False)
    nn.Module.train(reference, False)
    return DirectPreference(reference, options.dpo_beta)


def answer_log_probs(module: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of the log probabilities of each row's labels [R], in float32."""
    logits_RTV: Tensor = module(input_ids=batch.ids_RT, use_cache=False, **_positions(batch)).logits[:, :-1].float()
    labels_RT = batch.labels_RT[:, 1:]
    # Cross entropy of ignored labels is 0: they add nothing.
    losses_RT = F.cross_entropy(logits_RTV.transpose(1, 2), labels_RT, ignore_index=IGNORED_LABEL, reduction="none")
    return -losses_RT.sum(1)


def _positions(batch: Batch) -> dict[str, Any]:
    return {} if batch.positions_RT is None else {"position_ids": batch.positions_RT}
