"""The gradient monitor in a Lightning `Trainer`: one argument more. Needs `pip install lightning`.

    torchrun --nproc-per-node=2 examples/lightning_trainer.py
    python examples/lightning_trainer.py

As a job, when the worker knows it by name (APT_JOBS_ENTRY_POINTS='{"lightning": "examples/lightning_trainer.py"}'):

    {"kind": "train", "entry_point": "lightning", "num_ranks": 2}

A byte is predicted from the eight before it, on CPython's own documentation.
"""

import os
from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from apt_jobs.gradient_monitor.callbacks.lightning import GradientMonitorCallback

CONTEXT, BATCH = 8, 64


class NextByte(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 64), nn.Tanh(), nn.Linear(64, 256)
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    torch.manual_seed(1)
    windows = torch.tensor(list("\n".join(topics.values()).encode())).unfold(0, CONTEXT + 1, CONTEXT)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        max_steps=30,
        gradient_clip_val=1.0,
        callbacks=[GradientMonitorCallback(num_samples=BATCH)],  # the argument
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(NextByte(), DataLoader(TensorDataset(windows[:, :-1], windows[:, -1]), BATCH, shuffle=True))


if __name__ == "__main__":
    main()
