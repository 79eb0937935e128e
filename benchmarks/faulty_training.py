"""One rank of the trainings that the insight benchmark judges: healthy ones, and branches of them with one fault each.

    torchrun --nproc-per-node=2 -m benchmarks.faulty_training FOLDER FIRST_SEED NUM_SEEDS

A small GPT under DDP with AdamW, warm-up and clipping, on English text, watched by the project's monitor. Each
training stops twice for branches, early and late: the state is kept, a fault goes in, and the state is put back.
All is in one spool a rank, with a line where a branch begins and where it ends.
"""

import copy
import json
import math
import pydoc_data.topics
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.events.kinds import LineLogged
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.training.ddp import Rank, process_group
from benchmarks.faults import FAULTS, Fault, Injection, draw
from benchmarks.gpt2 import GPT2

SIZES = {"small": (2, 32), "large": (3, 64)}  # blocks, width
HEALTHY_STEPS = 1_020
BRANCH_LATE = 405  # no update is being measured here: one is every tenth step, and is known at the next
BRANCH_EARLY = range(35, 135, 10)  # one of them: what is usual is still being learned
BRANCH_STEPS = 40
BATCH_SIZE, LENGTH, VOCABULARY = 8, 32, 256
LEARNING_RATE, WARMUP_STEPS, CLIP_NORM = 2e-3, 50, 1.0
FLIP_SEED = 1_000
BRANCH_BEGINS, BRANCH_ENDS = "branch begins", "branch ends"  # sources of lines in the spool


@dataclass
class Training:
    """One model on one rank. `injection` None: healthy."""

    model: GPT2
    ddp: DistributedDataParallel
    optimizer: torch.optim.AdamW
    monitor: GradientMonitor
    text: Tensor
    rank: int
    seed: int
    injection: Injection | None = None

    def step(self, step: int) -> None:
        """One optimizer step; not finite gradients are left out on all ranks alike, as the project's trainer does."""
        injection = self.injection
        rate = LEARNING_RATE * min(step / WARMUP_STEPS, 1.0)
        if injection is not None:
            injection.begin(step)
            rate *= injection.learning_rate_factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids = self._batch(step)
        labels = ids if injection is None else injection.labels(ids)
        loss = functional.cross_entropy(self.ddp(ids).flatten(0, 1), labels[:, 1:].flatten())
        torch.autograd.backward(loss if injection is None else injection.loss(loss))
        norm = float(self.monitor.step(step, loss=loss, num_samples=BATCH_SIZE))
        if math.isfinite(norm):
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _batch(self, step: int) -> Tensor:
        dice = torch.Generator().manual_seed(1_000_003 * self.seed + 10 * step + self.rank)
        starts = torch.randint(0, len(self.text) - LENGTH, (BATCH_SIZE, 1), generator=dice)
        return self.text[starts + torch.arange(LENGTH)]


class NextToken(nn.Module):
    """The logits of all tokens but the last, so that labels are free to be wrong."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.model.logits(ids_BT)[:, :-1]


def main(folder: Path, seeds: range) -> None:
    """All sizes and seeds; rank 0 writes which faults there were."""
    with process_group("cpu") as rank:
        text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.int64)
        faults: dict[str, list[Fault]] = {}
        began = time.perf_counter()
        for size, (num_layers, width) in SIZES.items():
            for seed in seeds:
                name = f"{size}-{seed}"
                with SpoolWriter(folder / f"{name}.{rank.rank}") as spool:
                    faults[name] = _train(num_layers, width, seed, text, rank, spool)
                if rank.is_first:
                    described = {of: [asdict(fault) for fault in drawn] for of, drawn in faults.items()}
                    (folder / "faults.json").write_text(json.dumps(described))
                    print(f"{name} after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _train(num_layers: int, width: int, seed: int, text: Tensor, rank: Rank, spool: SpoolWriter) -> list[Fault]:
    torch.manual_seed(seed)
    model = GPT2(num_layers, width, LENGTH, VOCABULARY)
    ddp = DistributedDataParallel(NextToken(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=True)
    monitor = GradientMonitor(ddp, spool=spool)
    training = Training(model, ddp, optimizer, monitor, text, rank.rank, seed)
    faults: list[Fault] = []
    early = random.Random(seed).choice(BRANCH_EARLY)
    for step in range(1, HEALTHY_STEPS + 1):
        training.step(step)
        if step in (early, BRANCH_LATE):
            drawn = [draw(kind, step + 1, rank.world_size, model, seed) for kind in FAULTS]
            for fault in drawn:
                with _branch(training, spool, fault):
                    for later in range(step + 1, step + BRANCH_STEPS + 1):
                        training.step(later)
            faults += drawn
    return faults


@contextmanager
def _branch(training: Training, spool: SpoolWriter, fault: Fault) -> Iterator[None]:
    """Put a fault in, and restore everything afterwards."""
    model_state = copy.deepcopy(training.model.state_dict())
    optimizer_state = copy.deepcopy(training.optimizer.state_dict())
    training.injection = Injection(fault, training.model, training.rank, FLIP_SEED + training.seed)
    removals = training.injection.hooks()
    spool.append(LineLogged("info", BRANCH_BEGINS, fault.kind))
    yield
    spool.append(LineLogged("info", BRANCH_ENDS, fault.kind))
    for remove in removals:
        remove()
    training.injection = None
    training.model.load_state_dict(model_state)
    training.optimizer.load_state_dict(optimizer_state)


if __name__ == "__main__":
    first_seed, num_seeds = int(sys.argv[2]), int(sys.argv[3])
    main(Path(sys.argv[1]), range(first_seed, first_seed + num_seeds))
