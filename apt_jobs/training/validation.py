"""Validate: the mean loss on data that is not trained on, all-reduced, and what it means in other units.

Perplexity is e to the loss. Bits per byte is what a text costs under the model, whatever its tokenizer: all losses, in
bits, over the UTF-8 bytes of the tokens that were predicted (EOS has none).
"""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from apt_jobs.training.data import Batch, Batches
from apt_jobs.training.ddp import Rank, summed
from apt_jobs.training.ema import WeightAverage
from apt_jobs.training.progress import Progress
from apt_jobs.training.reporter import Reporter
from apt_jobs.training.sequences import IGNORED_LABEL, Sequences

MAX_EXPONENT = 700.0  # e to it still fits a float64
ByteCounts = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A data set under the model; the same on every rank."""

    loss: float  # nats a target, or what else is minimized
    bits_per_byte: float | None  # None: it is no cross entropy, or the bytes of tokens are not known

    def metrics(self, prefix: str, *, is_cross_entropy: bool) -> dict[str, int | float]:
        """Return what is reported besides the loss."""
        values: dict[str, int | float] = {}
        if is_cross_entropy:
            values[f"{prefix}/perplexity"] = math.inf if self.loss > MAX_EXPONENT else math.exp(self.loss)
        if self.bits_per_byte is not None:
            values[f"{prefix}/bits_per_byte"] = self.bits_per_byte
        return values


class Validator:
    """Validates at a step. `validate` is a collective: all ranks take part."""

    def __init__(
        self,
        batches: Batches,
        module: nn.Module,
        loss: Callable[[Batch], Tensor],
        tokenizer: PreTrainedTokenizerFast,
        rank: Rank,
        reporter: Reporter,
        progress: Progress,
        average: WeightAverage | None,
    ) -> None:
        """Validate by `loss`, which calls `module`."""
        self._batches, self._module, self._loss = batches, module, loss
        self._rank, self._reporter, self._progress, self._average = rank, reporter, progress, average
        self._is_cross_entropy = batches.options.objective == "next_token"
        self._token_bytes = token_bytes(tokenizer) if self._is_cross_entropy else None

    @torch.no_grad()
    def validate(self) -> float | None:
        """Return the mean loss over the validation split, the same on every rank; None without a split.

        The data sets that are evaluated by name are, too, and what comes of all is reported.
        """
        batches, progress = self._batches, self._progress
        if not len(batches.validation) and not batches.evaluations:
            return None
        val_loss: float | None = None
        metrics: dict[str, int | float] = {}
        nn.Module.train(self._module, False)
        with self._averaged():
            if len(batches.validation):
                measured = self._measure(batches.validation)
                val_loss = measured.loss
                metrics |= measured.metrics("validation", is_cross_entropy=self._is_cross_entropy)
            for name, sequences in batches.evaluations.items():
                measured = self._measure(sequences)
                metrics[f"eval/{name}/loss"] = measured.loss
                metrics |= measured.metrics(f"eval/{name}", is_cross_entropy=self._is_cross_entropy)
        nn.Module.train(self._module, True)
        if val_loss is not None:
            self._reporter.validated(progress.step, val_loss, progress.best_val_loss)
            progress.note_validation(val_loss)
        self._reporter.measured(progress.step, metrics)
        return val_loss

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.applied()

    def _measure(self, sequences: Sequences) -> Measured:
        """Return the mean over all targets. Collective, and a sync point."""
        totals = torch.zeros(3, dtype=torch.float64, device=self._rank.device)  # losses, targets, bytes
        for batch in self._batches.validation_batches(self._rank.rank, sequences):
            loss, count = self._loss(batch.rows.to(self._rank.device)).double(), batch.num_targets
            num_bytes = self._num_bytes(batch.rows.labels_RT)
            if count:
                totals += torch.stack([loss * count, torch.full_like(loss, count), torch.full_like(loss, num_bytes)])
        loss_sum, num_targets, num_bytes = summed(totals).tolist()
        bits = loss_sum / (math.log(2.0) * num_bytes) if num_bytes else None
        return Measured(loss_sum / num_targets, bits)

    def _num_bytes(self, labels_RT: Tensor) -> int:
        """Return the bytes of the labels that are predicted; 0 where they are not known."""
        if self._token_bytes is None:
            return 0
        targets = labels_RT[:, 1:]
        return int(self._token_bytes[targets[targets != IGNORED_LABEL].numpy()].sum())


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> ByteCounts | None:
    """Return how many bytes of text each token id stands for, special tokens for none; None: its kind does not tell.

    In byte-level vocabularies a character of a token is a byte. In those with byte fallback `<0x0A>` is one, and the
    mark of a space one more.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    stages = json.dumps([backend.get("decoder"), backend.get("pre_tokenizer")])
    vocabulary = tokenizer.get_vocab()
    counts = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
    if '"ByteLevel"' in stages:
        for token, number in vocabulary.items():
            counts[number] = len(token)
    elif '"ByteFallback"' in stages:
        for token, number in vocabulary.items():
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            counts[number] = 1 if is_byte else len(token.replace("\u2581", " ").encode())
    else:
        return None
    counts[list(tokenizer.all_special_ids)] = 0
    for number, added in tokenizer.added_tokens_decoder.items():
        counts[number] = 0 if added.special else len(added.content.encode())
    return counts
