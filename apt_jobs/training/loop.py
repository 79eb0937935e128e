"""The built-in trainer: a causal language model under DDP or FSDP2, from the first step to the last checkpoint.

What every rank must decide alike (the learning rate, whether a step counts, when to stop) is computed from values that
are the same on all ranks: the step, the reduced gradient norm, and one small all-reduce a step of loss and stop flag.
"""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedTokenizerFast

from apt_jobs.errors import OutOfSpace
from apt_jobs.events.kinds import (
    ActionTaken,
    CheckpointRemoved,
    CheckpointSaved,
    LineLogged,
    StepTrained,
    TrainingFinished,
    TrainingStarted,
    Validated,
)
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training.checkpoint import (
    Snapshot,
    delete_checkpoint,
    load_training_state,
    take_snapshot,
    verify_checkpoint,
    write_checkpoint,
)
from apt_jobs.training.data import Batches, open_batches, read_text, write_tokens
from apt_jobs.training.ddp import Rank, barrier, process_group, repeatable, summed
from apt_jobs.training.gradient_monitor import GradientMonitor
from apt_jobs.training.model import build_model, describe, load_model
from apt_jobs.training.optimization import adamw, learning_rate_at, precision_of
from apt_jobs.training.orders import Adjustments, Orders
from apt_jobs.training.parallel import local_part, spread
from apt_jobs.training.progress import CHECKPOINT_ENTRY, Progress
from apt_jobs.training.tokenizer import encode, load_tokenizer, train_tokenizer

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def train(run_file: RunFile, spool: SpoolWriter) -> None:
    """Run one attempt on this rank. Called by every rank.

    Raises:
        InvalidInput: the job, its data or its checkpoint cannot be used; the message says why.
    """
    with process_group(run_file.spec.device) as rank:
        _Trainer(run_file, spool, rank).run()


class _Trainer:
    def __init__(self, run_file: RunFile, spool: SpoolWriter, rank: Rank) -> None:
        self._run_file, self._spool, self._rank = run_file, spool, rank
        self._options = options = run_file.spec.training
        if options.deterministic:
            repeatable(rank.device)
        torch.manual_seed(options.seed)
        self._source = run_file.resume_dir or run_file.base_model_dir
        if self._source is not None and (self._source / "manifest.json").exists():
            verify_checkpoint(self._source)
        self._tokenizer = self._prepare_data()
        self._model = self._make_model().to(rank.device)
        self._batches = self._open_batches()
        self._spread = spread(self._model, options, rank)
        self._optimizer = adamw(self._model, options, rank.device)
        self._precision = precision_of(options.precision, rank.device)
        with self._autocast():
            self._spread.settle(self._batches.micro_batches(1, rank.rank)[0].to(rank.device))
        self._scaler = torch.amp.GradScaler(rank.device.type, enabled=self._precision is torch.float16)
        self._progress, self._adjustments = Progress(), Adjustments()
        self._orders, self._num_orders = Orders(run_file.orders_path, rank), 0
        self._saved_step = 0
        self._writing: Future[None] | None = None  # of the last checkpoint, on rank 0
        self._writer = ThreadPoolExecutor(1, "checkpoint") if rank.is_first else None
        self._monitor = GradientMonitor(
            self._spread.module,
            spool=spool,
            vanishing_below=run_file.spec.monitor.vanishing_below,
            exploding_above=run_file.spec.monitor.exploding_above,
            every_steps=run_file.spec.monitor.every_steps,
        )
        if run_file.resume_dir is not None:
            self._resume()

    def run(self) -> None:
        self._say_started()
        num_steps = self._batches.num_steps
        while self._progress.step < num_steps:
            stop = self._train_step()
            step = self._progress.step
            is_last = step == num_steps
            if stop or is_last or step % self._options.checkpoint_every_steps == 0:
                self._save(self._validate(), wait=stop or is_last)
            elif step % self._options.validate_every_steps == 0:
                self._validate()
            if stop and not is_last:
                self._end("stopped")
                return
            if self._num_orders:
                self._obey()
        self._end("finished")

    def _train_step(self) -> bool:
        """One optimizer step. True: a stop was asked for."""
        began = time.perf_counter()
        step = self._progress.step + 1
        learning_rate = learning_rate_at(step, self._batches.num_steps, self._options)
        learning_rate *= self._adjustments.learning_rate_factor
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._backward(step)
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else 1.0
        num_samples = self._options.batch_size * self._options.gradient_accumulation_steps
        norm = self._monitor.step(step, scale, loss=loss, num_samples=num_samples)
        stop_flag = float(self._rank.is_first and self._run_file.stop_path.exists())
        flags = torch.tensor([stop_flag, self._orders.num_waiting()], device=loss.device)
        shared = summed(torch.cat([loss[None], flags]))
        shared_loss, stop, num_orders, grad_norm = torch.cat(
            [shared, norm[None]]
        ).tolist()  # the one wait for a GPU in a step
        self._update(grad_norm)
        self._num_orders = int(num_orders)
        self._progress.step = step
        self._progress.train_loss = shared_loss / self._rank.world_size
        if self._rank.is_first:
            step_time_s = time.perf_counter() - began
            self._spool.append(
                StepTrained(
                    step=step,
                    epoch=self._batches.epoch_of(step),
                    train_loss=self._progress.train_loss,
                    learning_rate=learning_rate,
                    grad_norm=grad_norm,
                    step_time_ms=1000.0 * step_time_s,
                    tokens_per_s=self._tokens_per_step() / step_time_s,
                )
            )
        return bool(stop > 0)

    def _backward(self, step: int) -> Tensor:
        """Accumulate this step's gradients; returns the mean loss of this rank's micro batches (scalar)."""
        micro_batches = self._batches.micro_batches(step + self._adjustments.skipped_steps, self._rank.rank)
        total = torch.zeros((), device=self._rank.device)
        for number, batch in enumerate(micro_batches, start=1):
            ids = batch.to(self._rank.device, non_blocking=True)
            # The gradients are reduced in the last backward of a step only.
            with nullcontext() if number == len(micro_batches) else self._spread.accumulating():
                loss = self._loss(ids) / len(micro_batches)
                torch.autograd.backward(self._scaler.scale(loss))
            total += loss.detach()
        return total

    def _loss(self, ids: Tensor) -> Tensor:
        with self._autocast():
            loss: Tensor = self._spread.module(input_ids=ids, labels=ids).loss
        return loss

    def _autocast(self) -> torch.autocast:
        enabled = self._precision is not None
        return torch.autocast(self._rank.device.type, dtype=self._precision, enabled=enabled)

    def _update(self, grad_norm: float) -> None:
        """Apply the gradients, clipped; a step whose norm is not finite is left out on every rank alike."""
        if math.isfinite(grad_norm):
            self._scaler.unscale_(self._optimizer)
            limit = self._options.grad_clip_norm
            if limit is not None and grad_norm > limit:
                gradients = [local_part(p.grad) for p in self._model.parameters() if p.grad is not None]
                torch._foreach_mul_(gradients, limit / (grad_norm + CLIP_EPSILON))
            self._scaler.step(self._optimizer)
            self._scaler.update()
        elif self._scaler.is_enabled():
            self._scaler.update(self._scaler.get_scale() * self._scaler.get_backoff_factor())
        if not math.isfinite(grad_norm) and self._rank.is_first:
            message = f"step {self._progress.step + 1} is skipped: its gradient norm is {grad_norm}"
            self._spool.append(LineLogged("warning", "rank 0", message))
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Mean loss over the validation split, the same on every rank; None without a split."""
        if not self._options.validation_fraction:
            return None
        nn.Module.train(self._spread.module, False)
        totals = torch.zeros(2, dtype=torch.float64, device=self._rank.device)
        for batch, count in self._batches.validation_batches(self._rank.rank):
            loss = self._loss(batch.to(self._rank.device)).double()
            totals += torch.stack([loss * count, torch.full_like(loss, count)]) if count else 0.0
        nn.Module.train(self._spread.module, True)
        loss_sum, num_sequences = summed(totals).tolist()
        val_loss: float = loss_sum / num_sequences
        best = self._progress.best_val_loss
        if self._rank.is_first:
            step = self._progress.step
            is_best = _is_better(val_loss, best)
            self._spool.append(Validated(step, self._batches.epoch_of(step), val_loss, is_best))
        return val_loss

    def _save(self, val_loss: float | None, *, wait: bool) -> None:
        """Take a snapshot and write it in the background, or now if `wait`. Called by all ranks."""
        began = time.perf_counter()
        self._monitor.flush()
        self._settle()
        self._saved_step = self._progress.step
        progress, best = self._progress, self._progress.best_val_loss
        is_best = val_loss is not None and _is_better(val_loss, best)
        if is_best:
            progress.best_val_loss = val_loss
        state = {
            "global_step": progress.step,
            "epoch": self._batches.epoch_of(progress.step),
            "train_loss": progress.train_loss,
            "val_loss": val_loss,
            "best_val_loss": progress.best_val_loss,
            "kept": list(progress.kept),
            "is_best": is_best,
            "name": f"step-{progress.step:08d}-a{self._run_file.attempt}",
            "scaler": self._scaler.state_dict(),
            "monitor": self._monitor.state_dict(),
            "adjustments": self._adjustments.as_json(),
            "config": self._run_file.spec.model.model_dump(),
        }
        snapshot = take_snapshot(self._model, self._optimizer, self._rank)
        if snapshot is not None and self._writer is not None:
            stall_ms = 1000.0 * (time.perf_counter() - began)
            self._writing = self._writer.submit(self._write, snapshot, state, stall_ms)
            if wait:
                self._writing.result()
        if wait:
            barrier()

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written. When it failed, training goes on with the one before."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except OutOfSpace as exc:
            self._spool.append(LineLogged("error", "rank 0", f"{exc}; training goes on"))
        self._writing = None

    def _write(self, snapshot: Snapshot, state: dict[str, Any], stall_ms: float) -> None:
        """Write one checkpoint and say so, then let go of old ones. Runs in the writer's thread."""
        began = time.perf_counter()
        folder, name = self._run_file.checkpoints_dir, state["name"]
        saved = write_checkpoint(folder, name, snapshot, self._model, self._tokenizer, state)
        self._spool.append(
            CheckpointSaved(
                checkpoint_id=saved.checkpoint_id,
                filename=f"{self._run_file.checkpoint_prefix}/{name}",
                step=state["global_step"],
                epoch=state["epoch"],
                val_loss=state["val_loss"],
                train_loss=state["train_loss"],
                size_bytes=saved.size_bytes,
                is_best=state["is_best"],
                stall_ms=stall_ms,
                write_ms=1000.0 * (time.perf_counter() - began),
            )
        )
        entry = {"id": saved.checkpoint_id, "name": name, "is_best": state["is_best"], "step": state["global_step"]}
        self._progress.kept.append(entry)
        self._let_go()

    def _let_go(self) -> None:
        """Keep the newest `keep_checkpoints`, every one at a multiple of `keep_every_steps`, and the best one."""
        kept, every = self._progress.kept, self._options.keep_every_steps
        best = next((entry for entry in reversed(kept) if entry["is_best"]), None)
        for entry in kept[: -self._options.keep_checkpoints]:
            if entry is best or (every is not None and entry["step"] % every == 0):
                continue
            self._remove(entry, "replaced by newer ones")

    def _remove(self, entry: dict[str, Any], reason: str) -> None:
        self._progress.kept.remove(entry)
        folder = self._run_file.checkpoints_dir / entry["name"]
        if self._rank.is_first and folder.is_dir():
            self._spool.append(CheckpointRemoved(entry["id"], reason))
            delete_checkpoint(folder)

    def _resume(self) -> None:
        assert self._run_file.resume_dir is not None
        state = load_training_state(self._run_file.resume_dir, self._model, self._optimizer, self._rank)
        this = {key: state[field] for key, field in CHECKPOINT_ENTRY.items()}
        self._progress = Progress(
            state["global_step"], state["train_loss"], state["best_val_loss"], [*state["kept"], this]
        )
        self._adjustments = Adjustments(**state.get("adjustments", {}))
        self._monitor.load_state_dict(state["monitor"])
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def _obey(self) -> None:
        """Do what policies of the job order. Called by every rank after the same step."""
        self._settle()
        for order in self._orders.take(self._num_orders, self._progress.kept):
            phase, words = self._carry_out(order)
            if self._rank.is_first:
                taken = ActionTaken(self._progress.step, phase, order["action"], order["incident"], words)
                self._spool.append(taken)

    def _carry_out(self, order: dict[str, Any]) -> tuple[Literal["done", "refused"], str]:
        adjustments, step = self._adjustments, self._progress.step
        match order["action"]:
            case "cut_lr":
                adjustments.learning_rate_factor *= order["factor"]
                return (
                    "done",
                    f"the learning rate is now {adjustments.learning_rate_factor:.3g} of its schedule",
                )
            case "skip_batches":
                adjustments.skipped_steps += order["skip_steps"]
                return "done", f"the batches of the next {order['skip_steps']} steps are skipped"
            case "rollback":
                return self._roll_back(order)
        if self._saved_step < step:
            self._save(self._validate(), wait=False)
        return "done", f"a checkpoint of step {step} is saved"

    def _roll_back(self, order: dict[str, Any]) -> tuple[Literal["done", "refused"], str]:
        """Go on from before the incident, with batches after those of the incident. Called by every rank."""
        if order["checkpoint"] is None:
            self._adjustments.skipped_steps += order["skip_steps"]
            return "refused", f"no checkpoint is older than step {order['began_step']}; only batches are skipped"
        folder, progress = self._run_file.checkpoints_dir / order["checkpoint"], self._progress
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self._model, load_model(folder).state_dict(), options=whole)
        state = load_training_state(folder, self._model, self._optimizer, self._rank)
        came_from, progress.step = progress.step, state["global_step"]
        progress.train_loss, progress.best_val_loss = state["train_loss"], state["best_val_loss"]
        for entry in [entry for entry in progress.kept if entry["step"] > progress.step]:
            self._remove(entry, f"rolled back to step {progress.step}")
        self._adjustments.num_rollbacks += 1
        self._adjustments.skipped_steps += came_from - progress.step + order["skip_steps"]
        self._monitor.num_rollbacks, self._saved_step = self._adjustments.num_rollbacks, progress.step
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        skipped = came_from - progress.step + order["skip_steps"]
        return "done", f"went back from step {came_from} to {progress.step}; the batches of {skipped} steps are skipped"

    def _prepare_data(self) -> PreTrainedTokenizerFast:
        """Rank 0 makes the tokenizer and the tokens; the others wait and read them."""
        run_dir, spec = self._run_file.run_dir, self._run_file.spec
        folder = self._source or run_dir / "tokenizer"
        if self._rank.is_first:
            text = read_text(self._run_file.dataset_file)
            if self._source is None:
                train_tokenizer(text, spec.model.vocab_size, spec.model.max_seq_len).save_pretrained(folder)
            write_tokens(encode(load_tokenizer(folder), text), run_dir)
        barrier()
        return load_tokenizer(folder)

    def _make_model(self) -> nn.Module:
        if self._source is not None:
            return load_model(self._source)
        config = self._run_file.spec.model
        return build_model(config, max(config.vocab_size, len(self._tokenizer)), self._tokenizer.eos_token_id)

    def _open_batches(self) -> Batches:
        spec = self._run_file.spec
        longest: int = self._model.config.max_position_embeddings  # type: ignore[union-attr,assignment]
        seq_len = min(spec.model.max_seq_len, longest)
        return open_batches(self._run_file.run_dir, spec.dataset, seq_len, self._options, self._rank.world_size)

    def _tokens_per_step(self) -> int:
        return self._batches.sequences_per_step * self._batches.tokens_NT.shape[1]

    def _say_started(self) -> None:
        if not self._rank.is_first:
            return
        is_gpu = self._rank.device.type == "cuda"
        self._spool.append(
            TrainingStarted(
                world_size=self._rank.world_size,
                device=torch.cuda.get_device_name(self._rank.device) if is_gpu else "cpu",
                backend=self._rank.backend,
                num_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
                num_steps=self._batches.num_steps,
                steps_per_epoch=self._batches.steps_per_epoch,
                tokens_per_step=self._tokens_per_step(),
                resumed_from_step=self._progress.step,
                model_config=describe(self._model),
            )
        )

    def _end(self, outcome: str) -> None:
        self._monitor.flush()
        if not self._rank.is_first:
            return
        step = self._progress.step
        if outcome == "finished":
            epoch = self._batches.epoch_of(max(step, 1))
            finished = TrainingFinished(step, epoch, self._progress.train_loss, self._progress.best_val_loss)
            self._spool.append(finished)
        self._run_file.outcome_path.write_text(outcome)


def _is_better(val_loss: float, best: float | None) -> bool:
    """NaN is never: nothing would be better than it afterwards."""
    return math.isfinite(val_loss) and (best is None or val_loss < best)
