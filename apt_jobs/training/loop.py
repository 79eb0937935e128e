"""The built-in trainer: a causal language model under DDP or FSDP2, from the first step to the last checkpoint.

What every rank must decide alike (the learning rate, whether a step counts, when to stop) is computed from values that
are the same on all ranks: the step, the reduced gradient norm, and one small all-reduce a step of loss and stop flag.
Nothing waits for the GPU within a step: the host queues a step and reads what the one before it gave.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from apt_jobs.artifacts.conversations import RowKind
from apt_jobs.artifacts.manifest import has_manifest, require_whole
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.jobs.checkpoint_state import Adjustments
from apt_jobs.jobs.outcome import Outcome, write_outcome
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training.attention import keeps_examples_apart, prefer_flash_attention, use_causal_attention
from apt_jobs.training.checkpoint_manager import CheckpointManager
from apt_jobs.training.commands import Command, Commands
from apt_jobs.training.compilation import compile_or_fall_back, is_wanted
from apt_jobs.training.context import context_length
from apt_jobs.training.cuda_graph import CapturedPass
from apt_jobs.training.data import Batch, Batches
from apt_jobs.training.ddp import Rank, barrier, process_group, repeatable, summed
from apt_jobs.training.ema import WeightAverage
from apt_jobs.training.loss import LossTerms, chunked_loss_of
from apt_jobs.training.model import checkpoint_activations, make_model
from apt_jobs.training.objectives import make_objective
from apt_jobs.training.open_batches import open_batches
from apt_jobs.training.optimization import OptimizerStep, learning_rate_at, precision_of
from apt_jobs.training.optimizers import build_optimizers
from apt_jobs.training.parallel import Alone, Replicated, Sharded, spread
from apt_jobs.training.prefetch import Prefetcher
from apt_jobs.training.prepare import prepared_data
from apt_jobs.training.prepared import read_pointer
from apt_jobs.training.progress import Progress
from apt_jobs.training.reporter import Reporter
from apt_jobs.training.samples import Samples
from apt_jobs.training.step_results import Signals, StepResults
from apt_jobs.training.torchrun import read_rank_info
from apt_jobs.training.validation import Validator


def train(run_file: RunFile, spool: SpoolWriter) -> None:
    """Run one attempt on this rank. Called by every rank.

    Raises:
        InvalidInput: the job, its data or its checkpoint cannot be used; the message says why.
    """
    with prepared_data(run_file, spool, read_rank_info().rank) as tokenizer:
        if tokenizer is None:  # asked to stop meanwhile
            return
        with process_group(run_file.spec.device) as rank:
            _Trainer(run_file, spool, rank, tokenizer).run()


class _Trainer:
    """Joins the parts of a training. `run` is the whole of it; each verb below has its own method or module."""

    def __init__(self, run_file: RunFile, spool: SpoolWriter, rank: Rank, tokenizer: PreTrainedTokenizerFast) -> None:
        self._run_file, self._rank = run_file, rank
        self._options = options = run_file.spec.training
        if options.deterministic:
            repeatable(rank.device)
        prefer_flash_attention()
        torch.manual_seed(options.seed)
        for source in (run_file.resume_dir, run_file.base_model_dir, *run_file.base_adapter_dirs):
            if source is not None and has_manifest(source):
                require_whole(source)
        self._model = make_model(run_file, tokenizer).to(rank.device)
        if options.activation_checkpointing:
            checkpoint_activations(self._model)
        self._batches = self._open_batches()
        self._objective = make_objective(run_file, self._model, rank.device)
        self._prefetcher = Prefetcher(self._batches, rank)
        self._precision = precision_of(options.precision, rank.device)
        self._reporter = Reporter(spool, rank, self._batches)
        self._can_capture = False
        self._captured: CapturedPass | None = None
        self._spread = self._compile_and_spread()
        optimizers = build_optimizers(self._model, options)
        self._scaler = torch.amp.GradScaler(rank.device.type, enabled=self._precision is torch.float16)
        self._optimizer_step = OptimizerStep(self._model, optimizers, self._scaler, options.grad_clip_norm)
        self._average = None if options.ema_decay is None else WeightAverage(self._model, options.ema_decay)
        self._progress, self._adjustments = Progress(), Adjustments()
        self._commands, self._num_commands, self._stop = Commands(run_file.commands_path, rank), 0, False
        self._signals = Signals(run_file.stop_path, self._commands, rank)
        self._results, self._done_s = StepResults(rank.device), 0.0
        self._monitor = GradientMonitor(
            self._spread.module,
            spool=spool,
            vanishing_below=run_file.spec.monitor.vanishing_below,
            exploding_above=run_file.spec.monitor.exploding_above,
            every_steps=run_file.spec.monitor.every_steps,
        )
        self._validator = Validator(
            *(self._batches, self._spread.module, self._loss, tokenizer, rank, self._reporter),
            *(self._progress, self._average),
        )
        self._samples = Samples(
            *(self._model, tokenizer, options, context_length(run_file), read_pointer(run_file.run_dir).kind),
            *(rank, self._reporter, self._autocast, self._average),
        )
        self._checkpoints = CheckpointManager(
            *(run_file, rank, self._reporter, self._model, tokenizer, optimizers),
            *(self._scaler, self._monitor, self._progress, self._adjustments, self._average),
        )

    def run(self) -> None:
        """Train until all steps are done or a stop is asked for. Every rank goes the same way through it."""
        self._warm_up_buckets()
        self._capture_pass()
        if self._run_file.resume_dir is not None:
            self._checkpoints.resume(self._run_file.resume_dir)
        self._reporter.started(self._model, self._progress.step)
        while self._progress.step < self._batches.num_steps:
            self._queue_step()
            self._receive_results(num_left=1)  # of the step before
            self._validate_and_save_if_due()
            if self._stop and self._progress.step < self._batches.num_steps:
                self._save_at_stop()
                self._end(Outcome.STOPPED)
                return
            if self._is_out_of_patience():
                self._save_at_stop()
                break
            if self._num_commands:
                self._apply_commands()
        self._reporter.finished(self._progress)
        self._end(Outcome.FINISHED)

    def _compile_and_spread(self) -> Alone | Replicated | Sharded:
        """Compile the model if it is to be, then spread it over the ranks. All ranks take part."""
        options, rank = self._options, self._rank
        terms = LossTerms(options.label_smoothing, options.z_loss)
        needs_logits = options.objective == "dpo"
        loss = None if needs_logits else chunked_loss_of(self._model, terms)
        waits_nowhere = not self._batches.is_packed and use_causal_attention(self._model)
        if is_wanted(options.compile, rank.device):
            reason = compile_or_fall_back(self._model, loss, self._try_out, rank, deterministic=options.deterministic)
            if reason is not None:
                self._reporter.warning(f"training without torch.compile, which failed: {reason}")
            # A recomputed block asks for the state of the random generator, which a capture cannot give.
            self._can_capture = reason is None and waits_nowhere and not options.activation_checkpointing
        return spread(self._model, options, rank, self._precision)

    def _capture_pass(self) -> None:
        """Record the launches of a pass, where that is known to work: on one GPU, with a compiled model."""
        is_alone = isinstance(self._spread, Alone) and self._rank.device.type == "cuda"
        if not (self._can_capture and is_alone and self._batches.is_text) or self._scaler.is_enabled():
            return
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        micro_batches = self._prefetcher.micro_batches(1)
        one = micro_batches[0]
        try:
            self._captured = CapturedPass(
                lambda ids: self._loss(replace(one, ids_RT=ids, labels_RT=ids)), trained, one.ids_RT, len(micro_batches)
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as exc:
            self._reporter.warning(f"training without a CUDA graph, which could not be captured: {exc}")

    def _try_out(self) -> None:
        """Compute one micro batch on this rank alone, so that whatever has to be compiled is compiled."""
        batch = self._prefetcher.micro_batches(1)[0]
        with self._autocast():
            loss = self._objective(self._model, batch)
        if self._options.sharding == "ddp":  # a model that is to be sharded has no room for whole gradients
            torch.autograd.backward(loss)
        self._model.zero_grad(set_to_none=True)

    def _warm_up_buckets(self) -> None:
        """Run one backward pass that counts for nothing. All ranks take part."""
        ids = self._prefetcher.micro_batches(1)[0].ids_RT
        with self._autocast():
            self._spread.warm_up_buckets(ids)

    def _queue_step(self) -> None:
        """Queue one optimizer step. No wait for a GPU: what it gives is read by `_receive_results`."""
        began_s = time.perf_counter()
        self._progress.step = step = self._progress.step + 1
        learning_rate = learning_rate_at(step, self._batches.num_steps, self._options)
        learning_rate *= self._adjustments.learning_rate_factor
        self._optimizer_step.set_learning_rate(learning_rate)
        loss = self._backward(step)
        num_samples = self._options.batch_size * self._options.gradient_accumulation_steps
        norm = self._monitor.step(step, self._loss_scale(), loss=loss, num_samples=num_samples)
        # Collective, all ranks take part: the only one of a step besides the reduction of the gradients. Whatever all
        # ranks must know rides on it.
        shared = summed(torch.cat([loss[None], self._signals.read()]))
        self._results.send(step, learning_rate, began_s, torch.cat([shared, norm[None]]))
        self._optimizer_step.apply(norm)
        if self._average is not None:
            self._average.update(step)
        self._results.note_queued()

    def _backward(self, step: int) -> Tensor:
        """Accumulate this step's gradients; returns the mean loss of this rank's micro batches (scalar)."""
        micro_batches = self._prefetcher.micro_batches(step + self._adjustments.skipped_steps)
        if self._captured is not None:
            return self._captured.run([batch.ids_RT for batch in micro_batches])
        total = torch.zeros((), device=self._rank.device)
        for number, batch in enumerate(micro_batches, start=1):
            # The gradients are reduced over the ranks in the last backward of a step only.
            with nullcontext() if number == len(micro_batches) else self._spread.accumulating():
                loss = self._loss(batch) / batch.divisor
                torch.autograd.backward(self._scaler.scale(loss))
            total += loss.detach()
        return total

    def _loss(self, batch: Batch) -> Tensor:
        with self._autocast():
            return self._objective(self._spread.module, batch)

    def _autocast(self) -> torch.autocast:
        # Each weight is cast once in a pass: there is nothing to cache, and a CUDA graph must not find a cast done.
        enabled = self._precision is not None
        return torch.autocast(self._rank.device.type, self._precision, enabled=enabled, cache_enabled=False)

    def _loss_scale(self) -> float | Tensor:
        """Return what the gradients are multiplied by: on the device, as `get_scale` would wait for it."""
        return self._scaler.scale(torch.ones((), device=self._rank.device)) if self._scaler.is_enabled() else 1.0

    def _receive_results(self, *, num_left: int) -> None:
        """Report the steps that are done but for the newest `num_left`, and note what they say to do.

        Sync point: waits for those steps. All ranks receive the same numbers after the same step.
        """
        for result in self._results.receive(num_left=num_left):
            step_time_s = result.done_s - max(result.began_s, self._done_s)
            self._done_s = result.done_s
            self._progress.train_loss = train_loss = result.loss_sum / self._rank.world_size
            self._stop, self._num_commands = self._stop or result.stop, result.num_commands
            if not math.isfinite(result.grad_norm):
                self._reporter.step_skipped(result.step, result.grad_norm)
            self._reporter.step_trained(result.step, train_loss, result.learning_rate, result.grad_norm, step_time_s)

    def _validate_and_save_if_due(self) -> None:
        """Do what the step asks for. A stop has no time for a validation."""
        step, options = self._progress.step, self._options
        is_last = step == self._batches.num_steps
        is_saved = is_last or step % options.checkpoint_every_steps == 0
        if self._stop and not is_last:
            return
        if is_saved or step % options.validate_every_steps == 0:
            self._receive_results(num_left=0)  # its time ends here; a stop may come to light
            val_loss = None if self._stop else self._validator.validate()
            if is_saved:
                self._save(val_loss, wait=is_last)
            if is_saved and not self._stop:
                self._samples.generate(step)

    def _is_out_of_patience(self) -> bool:
        """Tell whether validations have brought nothing better for too long; the same on every rank."""
        patience, num_worse = self._options.early_stopping_patience, self._progress.num_worse
        if patience is None or num_worse < patience or self._progress.step == self._batches.num_steps:
            return False
        lowest = self._progress.lowest_val_loss
        self._reporter.warning(f"ended early: {num_worse} validations in a row were not below the best loss, {lowest}")
        return True

    def _save_at_stop(self) -> None:
        """Save this step, unless it is saved: whoever asked for the stop does not wait long."""
        if self._checkpoints.is_saved:
            self._checkpoints.wait_for_checkpoint()
            barrier()
        else:
            self._save(None, wait=True)

    def _save(self, val_loss: float | None, *, wait: bool) -> None:
        """Save this step, with its own loss. All ranks take part; a sync point."""
        self._receive_results(num_left=0)
        self._checkpoints.save(val_loss, self._batches.epoch_of(self._progress.step), wait=wait)

    def _apply_commands(self) -> None:
        """Apply what policies of the job ask for. All ranks take part, after the same step."""
        self._receive_results(num_left=0)  # a step that was queued has not seen that these are applied
        self._checkpoints.wait_for_checkpoint()  # a roll-back must know every checkpoint
        num_commands, self._num_commands = self._num_commands, 0
        for command in self._commands.pop(num_commands, self._progress.kept):
            is_done, outcome = self._apply(command)
            self._reporter.command_applied(self._progress.step, command, is_done=is_done, outcome=outcome)

    def _apply(self, command: Command) -> tuple[bool, str]:
        """Apply one command; returns whether it could be, and what was done, in words."""
        adjustments, step = self._adjustments, self._progress.step
        match command.action:
            case "cut_lr":
                adjustments.learning_rate_factor *= command.factor
                return True, f"the learning rate is now {adjustments.learning_rate_factor:.3g} of its schedule"
            case "skip_batches":
                adjustments.skipped_steps += command.skip_steps
                return True, f"the batches of the next {command.skip_steps} steps are skipped"
            case "rollback":
                return self._roll_back(command)
        if not self._checkpoints.is_saved:
            self._save(self._validator.validate(), wait=False)
        return True, f"a checkpoint of step {step} is saved"

    def _roll_back(self, command: Command) -> tuple[bool, str]:
        """Go on from before the incident, with batches after those of the incident. All ranks take part."""
        if command.checkpoint is None:
            self._adjustments.skipped_steps += command.skip_steps
            return False, f"no checkpoint is older than step {command.began_step}; only batches are skipped"
        came_from = self._progress.step
        num_lost = self._checkpoints.roll_back(command.checkpoint)
        num_skipped = num_lost + command.skip_steps
        self._adjustments.num_rollbacks += 1
        self._adjustments.skipped_steps += num_skipped
        self._monitor.num_rollbacks = self._adjustments.num_rollbacks
        return True, (
            f"went back from step {came_from} to {self._progress.step}; the batches of {num_skipped} steps are skipped"
        )

    def _open_batches(self) -> Batches:
        run_file = self._run_file
        is_text = read_pointer(run_file.run_dir).kind is RowKind.TEXT
        wants_packing = run_file.spec.data.separate_documents if is_text else run_file.spec.data.packing
        can_pack = wants_packing and keeps_examples_apart(self._model)
        context = context_length(run_file)
        return open_batches(run_file.run_dir, run_file.spec, context, self._rank.world_size, can_pack=can_pack)

    def _end(self, outcome: Outcome) -> None:
        """Leave word of how the attempt ended, as the last act."""
        self._prefetcher.close()
        self._monitor.flush()
        if self._rank.is_first:
            write_outcome(self._run_file.outcome_path, outcome)
