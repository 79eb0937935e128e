"""The gradient monitor in a Hugging Face `Trainer`: one line more. Needs `pip install accelerate`, as `Trainer` does.

    torchrun --nproc-per-node=2 examples/hugging_face_trainer.py
    python examples/hugging_face_trainer.py

As a job, when the worker knows it by name (APT_JOBS_ENTRY_POINTS='{"trainer": "examples/hugging_face_trainer.py"}'):

    {"kind": "train", "entry_point": "trainer", "num_ranks": 2}

A small Llama learns the bytes of CPython's own documentation.
"""

import tempfile
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from apt_jobs.gradient_monitor.callbacks.hugging_face import GradientMonitorCallback

CONTEXT = 32


def main() -> None:
    torch.manual_seed(1)
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    windows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=30,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                max_grad_norm=1.0,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        )
        trainer.add_callback(GradientMonitorCallback(trainer))  # the line
        trainer.train()


if __name__ == "__main__":
    main()
