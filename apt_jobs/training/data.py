"""The data: one text, as tokens in a file that all ranks map, cut into sequences with an order that can be repeated.

Tensors: B sequences of a micro batch, T tokens of a sequence.
"""

import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.spec import BUILTIN_DATASET, TrainingOptions

TOKENS_FILE = "tokens.npy"


def read_text(file: Path | None) -> str:
    """The text of a data set; None: the built-in one.

    Raises:
        InvalidDataset: it is missing, empty or no UTF-8 text.
    """
    if file is None:
        return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidDataset(f"data set {file.stem!r} is not UTF-8 text (byte {exc.start:,})") from exc
    except OSError as exc:
        raise InvalidDataset(f"data set {file.stem!r} cannot be read: {exc.strerror}") from exc
    if not text.strip():
        raise InvalidDataset(f"data set {file.stem!r} is empty")
    if "\0" in text:
        raise InvalidDataset(f"data set {file.stem!r} is binary (it has a zero byte)")
    return text


def write_tokens(tokens: list[int], run_dir: Path) -> None:
    """Write the tokens for all ranks. Called by one rank; the others wait at a barrier."""
    np.save(run_dir / TOKENS_FILE, np.asarray(tokens, dtype=np.uint32))


@dataclass(frozen=True)
class Batches:
    """Which sequences each rank sees at each step: a function of the seed and the step alone."""

    tokens_NT: "np.ndarray[tuple[int, int], np.dtype[np.uint32]]"
    num_train: int  # sequences; the rest, at the end, is for validation
    options: TrainingOptions
    world_size: int

    @property
    def sequences_per_step(self) -> int:
        return self.options.batch_size * self.options.gradient_accumulation_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.tokens_NT.shape[1]

    @property
    def steps_per_epoch(self) -> int:
        return self.num_train // self.sequences_per_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        steps = self.steps_per_epoch * self.options.epochs
        return steps if self.options.max_steps is None else min(steps, self.options.max_steps)

    def epoch_of(self, step: int) -> int:
        """Epoch (from 0) of an optimizer step (from 1)."""
        return (step - 1) // self.steps_per_epoch

    def micro_batches(self, step: int, rank: int) -> list[Tensor]:
        """The micro batches [B, T] of one rank at one optimizer step."""
        generator = torch.Generator().manual_seed(self.options.seed + 1_000_003 * self.epoch_of(step))
        order = torch.randperm(self.num_train, generator=generator)
        start = (step - 1) % self.steps_per_epoch * self.sequences_per_step
        shape = (self.options.gradient_accumulation_steps, self.world_size, self.options.batch_size)
        rows = order[start : start + self.sequences_per_step].view(shape)[:, rank]
        return [self._rows(part) for part in rows]

    def validation_batches(self, rank: int) -> list[tuple[Tensor, int]]:
        """This rank's share of the validation split: batches [B, T] and how many of their sequences count.

        All ranks get equally many batches, as a sharded model needs; those beyond a rank's share count for nothing.
        """
        split = torch.arange(self.num_train, len(self.tokens_NT))
        parts = [
            torch.split(split[number :: self.world_size], self.options.batch_size) for number in range(self.world_size)
        ]
        mine = [(self._rows(part), len(part)) for part in parts[rank] if len(part)]
        return mine + [(self._rows(split[:1]), 0)] * (len(parts[0]) - len(mine))

    def _rows(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.tokens_NT[rows.numpy()].astype(np.int64))


def open_batches(run_dir: Path, dataset: str, seq_len: int, options: TrainingOptions, world_size: int) -> Batches:
    """Map the token file and cut it.

    Raises:
        InvalidDataset: it is too short for one step; the message says how long it has to be.
    """
    tokens = np.load(run_dir / TOKENS_FILE, mmap_mode="r")
    num_sequences = len(tokens) // seq_len
    wants_validation = options.validation_fraction > 0
    num_validation = max(round(num_sequences * options.validation_fraction), 1) if wants_validation else 0
    per_step = options.batch_size * options.gradient_accumulation_steps * world_size
    num_train = num_sequences - num_validation
    if num_train < per_step:
        name = "the built-in data set" if dataset == BUILTIN_DATASET else f"data set {dataset!r}"
        raise InvalidDataset(
            f"{name} has {len(tokens):,} tokens, which make {num_sequences:,} sequences of {seq_len}; one step needs "
            f"{per_step:,} for training and {num_validation} for validation: use more text, shorter sequences "
            "(max_seq_len), or a smaller batch (batch_size, gradient_accumulation_steps, num_ranks)"
        )
    tokens_NT = tokens[: num_sequences * seq_len].reshape(num_sequences, seq_len)
    return Batches(tokens_NT, num_train, options, world_size)
