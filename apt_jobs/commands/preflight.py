"""`apt-jobs submit --dry-run`: what a job would take and where it could run, as lines."""

from collections.abc import Mapping
from typing import Any

from apt_jobs.commands.terminal import echo

_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "other")


def print_preflight(answer: Mapping[str, Any]) -> None:
    """Print the answer of `POST /api/jobs?dry_run=true`; what is not known is left out."""
    if (memory := answer["memory_per_rank_bytes"]) is not None:
        parts = ", ".join(f"{name} {_size(memory[name])}" for name in _PARTS)
        echo(f"memory per rank: about {_size(memory['total'])} ({parts})")
    if answer["num_steps"] is not None:
        trained = answer["num_trainable_parameters"]
        echo(f"parameters: {answer['num_parameters']:,}, of which about {trained:,} are trained")
        echo(f"steps: about {answer['num_steps']:,} of {answer['tokens_per_step']:,} tokens")
        kept, free = answer["checkpoints_bytes"], answer["disk_free_bytes"]
        echo(f"checkpoints: about {_size(kept)} at once, {_size(free)} are free")
    for row in answer["workers"]:
        echo(f"{row['worker']}: {'could run it' if row['fits'] else row['why_not']}")
    if answer["fits"] is None:
        echo("no worker of its queue is alive; the job would wait for one")
    for words in answer["advice"]:
        echo(f"would fit: {words}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
