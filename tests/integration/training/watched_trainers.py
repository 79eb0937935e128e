"""One rank of the callbacks' tests: trains with Hugging Face and with Lightning, and writes what the monitor saw.

Gradients are accumulated and clipped to almost nothing, so that a norm taken at the wrong moment is far off.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from apt_jobs.events.current_spool import spool_of_job
from apt_jobs.events.kinds import GradientsRecorded, RankGradientsRecorded
from apt_jobs.events.spool import SpoolReader, SpoolWriter
from apt_jobs.gradient_monitor.callbacks import hugging_face, lightning
from apt_jobs.training.run import leave

NUM_STEPS, ACCUMULATED, CLIP = 3, 2, 1e-3
RANK, NUM_RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Squares(nn.Module):
    """A model in the form that Hugging Face calls; its losses are large enough to be clipped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.last(torch.tanh(self.first(x))).square().mean()}


class Module(LightningModule):
    """The same for Lightning, which writes down the gradients before they are clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Squares()
        self.expected: list[list[float]] = []
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.model(batch[0])["loss"]
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.expected.append([p.grad.double().norm().item() for p in self.parameters() if p.grad is not None])


def main(folder: Path) -> None:
    """Run both. Lightning first: it makes its own process group, and Hugging Face takes what there is."""
    results = {}
    for name, train in (("lightning", _lightning), ("hugging_face", _hugging_face)):
        path = folder / f"{name}-{RANK}.spool"
        with SpoolWriter(path) as spool, spool_of_job(spool):
            expected, expected_losses = train()
        events = [event for _, event in SpoolReader(path).read()]
        results[name] = {
            "expected": expected,
            "expected_losses": expected_losses,
            "norms": [event.norms for event in events if isinstance(event, GradientsRecorded)],
            "local": [event.norms for event in events if isinstance(event, RankGradientsRecorded)],
            "losses": [event.loss for event in events if isinstance(event, RankGradientsRecorded)],
            "num_samples": [event.num_samples for event in events if isinstance(event, RankGradientsRecorded)],
        }
    (folder / f"results-{RANK}.json").write_text(json.dumps(results))


def _rows() -> Tensor:
    """[row, feature]: enough for all ranks and steps."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(4 * NUM_RANKS * ACCUMULATED * NUM_STEPS, 6, generator=generator) * 3.0


def _lightning() -> tuple[list[Any], list[float]]:
    """Norms of every layer, and this rank's losses."""
    module = Module()
    LightningTrainer(
        accelerator="cpu",
        devices=NUM_RANKS,
        max_steps=NUM_STEPS,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=CLIP,
        callbacks=[lightning.GradientMonitorCallback(num_samples=8)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    ).fit(module, DataLoader(TensorDataset(_rows()), 4))
    pairs = zip(module.losses[::ACCUMULATED], module.losses[1::ACCUMULATED], strict=True)
    return module.expected, [sum(pair) / ACCUMULATED for pair in pairs]


def _hugging_face() -> tuple[list[Any], list[float]]:
    """Total norms, and losses averaged over the ranks: what `Trainer` logs."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=Squares(),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=NUM_STEPS,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=ACCUMULATED,
                max_grad_norm=CLIP,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=[{"x": row} for row in _rows()],
        )
        trainer.add_callback(hugging_face.GradientMonitorCallback(trainer))
        trainer.train()
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line["grad_norm"] for line in lines], [line["loss"] for line in lines]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
