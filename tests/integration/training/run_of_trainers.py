"""Train with Hugging Face or Lightning as a job that is stopped in step 4: `python run_of_trainers.py NAME`."""

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import apt_jobs
from apt_jobs.gradient_monitor.callbacks import hugging_face_run, lightning_run
from apt_jobs.run.current import Run

STOP_STEP, NUM_STEPS = 4, 8
ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(9))


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        return {"loss": self.layer(x).square().mean()}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Squares()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.model(batch[0])["loss"]
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.model(batch[0])["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def stop(run: Run, step: int) -> None:
    """As the supervisor does when a user pauses the job."""
    if step == STOP_STEP and run.attempt == 1:
        (run.output_dir.parent / "attempt" / "stop").write_text("paused by a user")


class HuggingFaceStopper(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop(apt_jobs.current_run(), state.global_step + 1)


class LightningStopper(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        stop(apt_jobs.current_run(), trainer.global_step + 1)


def hugging_face() -> int:
    run = apt_jobs.current_run()
    trainer = Trainer(
        model=Squares(),
        args=TrainingArguments(
            output_dir="out",  # in the job's own folder, which is the working directory
            max_steps=NUM_STEPS,
            per_device_train_batch_size=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            prediction_loss_only=True,
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"x": row} for row in ROWS],
        eval_dataset=[{"x": row} for row in ROWS[:8]],
        callbacks=[HuggingFaceStopper(), hugging_face_run.RunCallback()],
    )
    trainer.train(resume_from_checkpoint=str(run.resume_dir) if run.resume_dir else None)
    return int(trainer.state.global_step)


def lightning() -> int:
    run = apt_jobs.current_run()
    trainer = LightningTrainer(
        accelerator="cpu",
        devices=1,
        max_steps=NUM_STEPS,
        log_every_n_steps=1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[
            LightningStopper(),
            lightning_run.RunCallback(),
            ModelCheckpoint(dirpath="out", every_n_train_steps=3),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(TensorDataset(ROWS), 4), DataLoader(TensorDataset(ROWS[:8]), 4)
    resume = run.resume_dir / lightning_run.CHECKPOINT_FILE if run.resume_dir else None
    trainer.fit(Module(), *loaders, ckpt_path=resume)
    return int(trainer.global_step)


if __name__ == "__main__":
    print(hugging_face() if sys.argv[1] == "hugging_face" else lightning())
