"""The gradient monitor: the norm of every layer's gradient at every step, of all ranks and of each, and its history.

In any PyTorch loop, on every rank:

    monitor = GradientMonitor(model, optimizer)  # `model`: the DDP module, if there is one
    loss.backward(); monitor.step(loss=loss)     # before clipping and before the optimizer
    monitor.export_for_webui()

No collective for the log: each rank appends to its own spool what it sees, its own gradients before DDP averages them
included, and the supervisor joins the ranks by step. No wait for a GPU: numbers are copied to pinned memory, and read
later. `sync_gradients_distributed` and `aggregate_anomalies_distributed` are the calls that do talk to other ranks.
"""

import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import finite_or_name
from apt_jobs.events.current_spool import current_spool
from apt_jobs.events.kinds import (
    ANOMALY_KINDS,
    AnomaliesFound,
    BackwardOrderSeen,
    Event,
    GradientsRecorded,
    LayerAnomaly,
    LayersNamed,
    LineLogged,
    RankGradientsRecorded,
    UpdatesMeasured,
)
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.gradient_monitor.layer_statistics import LayerStatistics
from apt_jobs.gradient_monitor.local_norms import ORDER_SETTLED_AT, LocalNorms, elapsed_ms, local_norms_of, moment
from apt_jobs.gradient_monitor.local_run import RUNS_DIR, open_local_spool, run_name
from apt_jobs.gradient_monitor.pinned_ring import PinnedRing
from apt_jobs.gradient_monitor.step_label import StepLabel, TimelineStep
from apt_jobs.gradient_monitor.update_norms import UpdateNorms
from apt_jobs.gradient_monitor.watched_layers import WatchedLayers, require_same_layers

MAX_TIMELINE_STEPS = 1_000  # kept in memory for `export_for_webui`; the spool has all
LOOK_FOR_NEW_EVERY_STEPS = 10
MAX_NAMED_ANOMALIES = 1_000  # layers of one `anomaly` event; `gradient` has the indexes of all


class GradientMonitor:
    """Watch the gradients of `model`'s trainable parameters ("layers", by name), on every rank.

    Args:
        model: The model whose `named_parameters` are watched. Shared parameters count once, frozen ones not until they
            are trained. Given the `DistributedDataParallel` module, it also sees each rank's gradients before the
            reduction.
        optimizer: The optimizer whose learning rate is logged with the loss as the job's curves. A trainer that logs
            them itself (as the built-in one does) leaves it out.
        spool: Where this rank's events go. Default: the spool of the job that this process belongs to; outside of any
            job a folder of its own in `runs_dir`, which `apt-jobs import` shows later.
        vanishing_below: Norm of a layer below which it is an anomaly. NaN and Inf always are.
        exploding_above: Norm of a layer above which it is an anomaly.
        every_steps: Optimizer steps between two records.
        runs_dir: Folder for runs outside of a job. None: nothing is written there.

    Raises:
        InvalidInput: there is nothing to watch, or the ranks disagree on the set of layers (raised on every rank).

    Example:
        with GradientMonitor(model, optimizer) as monitor:  # after DDP
            for x, y in batches:
                loss = loss_of(model(x), y)
                loss.backward()
                monitor.step(loss=loss)  # before clipping
                optimizer.step()
                optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        spool: SpoolWriter | None = None,
        *,
        vanishing_below: float = 1e-7,
        exploding_above: float = 1e3,
        every_steps: int = 1,
        runs_dir: Path | None = RUNS_DIR,
    ) -> None:
        self._layers = WatchedLayers(model)
        self._device = self._layers.device
        require_same_layers(tuple(self._layers.names), self._device)
        if not self._layers.names:
            raise InvalidInput("the model has no trainable parameter: there is no gradient to watch")
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._optimizer, self._spool = optimizer, spool if spool is not None else current_spool()
        local_name = run_name(self._device)  # by all ranks, as it is a collective
        if self._spool is None and runs_dir is not None:
            self._spool = open_local_spool(runs_dir / local_name, self._rank)
        self._vanishing_below, self._exploding_above = vanishing_below, exploding_above
        self._every_steps = every_steps
        self._pending: list[Event] = []  # of this step, for the spool
        self._timeline: deque[TimelineStep] = deque(maxlen=MAX_TIMELINE_STEPS)
        self._statistics = LayerStatistics(len(self.names))
        self._anomalies = dict.fromkeys(ANOMALY_KINDS, 0)
        self._total_steps, self._last_step = 0, 0
        self._norms: Tensor | None = None  # [layer], of the last step
        self._ring: PinnedRing[StepLabel] = PinnedRing(self._device)
        self._update_ring: PinnedRing[int] = PinnedRing(self._device)
        self._updates = UpdateNorms(self._device)
        self._local = self._hook(model)
        self.num_rollbacks = 0  # told with every record, as steps after a roll-back have the numbers of earlier ones
        self._num_orders = 0
        self._begin: Any = None
        self._called_s: float | None = None
        self._emit_from_first_rank(LayersNamed(self.names))
        self._flush_pending()

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in the order of all norms. Layers that are trained later are added at the end."""
        return tuple(self._layers.names)

    @property
    def num_dropped(self) -> int:
        """Steps whose norms could not be kept, as the GPU was too far behind."""
        return self._ring.num_dropped

    @torch.no_grad()
    def step(
        self,
        step: int | None = None,
        scale: float | Tensor = 1.0,
        *,
        is_unscaled: bool = False,
        loss: Tensor | float | None = None,
        num_samples: int = 1,
    ) -> Tensor:
        """Record the gradients as they are now, and return their total norm.

        Call it on every rank after the backward pass and before clipping. A layer without a gradient counts as 0 and
        never as an anomaly. Nothing waits for the GPU.

        Args:
            step: The optimizer step, from 1 on. Default: one more than last time.
            scale: The AMP loss scale by which gradients are multiplied now.
            is_unscaled: They no longer are (`scaler.unscale_`), but in the backward pass they were.
            loss: This rank's own loss.
            num_samples: How many samples this rank contributed.

        Returns:
            The total L2 norm, unscaled: a scalar on the device.

        Example:
            norm = monitor.step(loss=loss, scale=scaler.get_scale())
        """
        step = self._last_step + 1 if step is None else step
        self._last_step = step
        if step % LOOK_FOR_NEW_EVERY_STEPS == 0:
            self._look_for_new()
        norms, present = self._layers.norms()
        is_scaled = isinstance(scale, Tensor) or scale != 1.0
        norms = norms / scale if is_scaled and not is_unscaled else norms
        self._norms = norms
        if step % self._every_steps == 0:
            self._record(step, norms, present, scale if is_scaled else None, loss, num_samples)
        if self._local is not None:
            self._local.wanted = (step + 1) % self._every_steps == 0
        self._note_update(step)
        self._collect()
        self._begin = moment(is_cuda=self._device.type == "cuda")
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def flush(self) -> None:
        """Wait for the norms that are still on their way: call it at the end, not in the loop."""
        self._collect(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()

    @torch.no_grad()
    def sync_gradients_distributed(self) -> dict[str, float]:
        """Return the last step's global norm of each layer, the same on every rank: the root mean square over ranks.

        Called by every rank; one collective for all layers. For gradients that DDP reduced the result is their norm.
        """
        if self._norms is None:
            raise InvalidInput("no step was recorded yet: call step() first")
        squares = self._norms.double().square()
        if dist.is_initialized():
            dist.all_reduce(squares)
            squares /= dist.get_world_size()
        return dict(zip(self.names, squares.sqrt().tolist(), strict=True))

    def aggregate_anomalies_distributed(self) -> dict[str, int]:
        """Return anomalies of each kind, summed over the ranks. Called by every rank; one collective."""
        counts = torch.tensor([self._anomalies[kind] for kind in ANOMALY_KINDS], device=self._device)
        if dist.is_initialized():
            dist.all_reduce(counts)
        return dict(zip(ANOMALY_KINDS, counts.tolist(), strict=True))

    def export_for_webui(self) -> dict[str, Any]:
        """SPEC S1's payload, JSON-serialisable: the newest steps, statistics over all steps, anomalies by kind."""
        return {
            "gradient_timeline": [
                {
                    "step": record.step,
                    "timestamp": record.timestamp,
                    "layers": {
                        name: {"norm": finite_or_name(norm), "is_anomaly": is_anomaly}
                        for name, norm, is_anomaly in zip(
                            self.names, record.norms.tolist(), record.anomalous.tolist(), strict=False
                        )
                    },
                }
                for record in self._timeline
            ],
            "layer_statistics": self._statistics.export(self.names),
            "anomaly_summary": {kind: count for kind, count in self._anomalies.items() if count},
            "total_steps": self._total_steps,
            "timestamp": time.time(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain JSON: statistics and counts, not the timeline."""
        self.flush()
        return {
            "total_steps": self._total_steps,
            "anomalies": dict(self._anomalies),
            "statistics": dict(zip(self.names, self._statistics.rows(), strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where `state_dict` stopped. Layers that it does not know begin at zero."""
        self._total_steps = state["total_steps"]
        self._anomalies.update(state["anomalies"])
        for index, name in enumerate(self.names):
            if name in state["statistics"]:
                self._statistics.load_row(index, state["statistics"][name])

    def _look_for_new(self) -> None:
        if self._layers.look_for_new():
            self.flush()  # rare, so it may wait: what is on its way has the old number of layers
            self._statistics.grow(len(self.names))
            self._emit_from_first_rank(LayersNamed(self.names))

    def _hook(self, model: nn.Module) -> LocalNorms | None:
        if not isinstance(model, DistributedDataParallel) or dist.get_world_size(model.process_group) == 1:
            return None
        try:
            return local_norms_of(model, self._device)
        except RuntimeError as exc:
            self._emit_from_first_rank(
                LineLogged("warning", "rank 0", f"no norms of each rank before the reduction: {exc}")
            )
            return None

    def _record(
        self,
        step: int,
        norms: Tensor,
        present: NDArray[np.bool_],
        scale: float | Tensor | None,
        loss: Tensor | float | None,
        num_samples: int,
    ) -> None:
        """Send one step's numbers to the host: norms, then what there is of local norms and loss."""
        local, order, ready = self._local.take(self._layers.index_of) if self._local else (None, [], None)
        parts = [norms]
        if local is not None:
            parts.append(local if scale is None else local / scale)
            self._emit_order(step, order)
        if loss is not None:
            value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, device=self._device)
            parts.append(value.reshape(1).to(self._device, torch.float32))
        now_s = time.perf_counter()
        label = StepLabel(
            step=step,
            at=time.time(),
            present=present,
            local_order=order,
            has_loss=loss is not None,
            num_samples=num_samples,
            is_scaled=scale is not None,
            num_rollbacks=self.num_rollbacks,
            step_time_ms=None if self._called_s is None else 1000.0 * (now_s - self._called_s),
            learning_rate=None if self._optimizer is None else float(self._optimizer.param_groups[0]["lr"]),
            begin=self._begin,
            ready=ready,
        )
        self._called_s = now_s
        self._ring.send(torch.cat(parts) if len(parts) > 1 else norms, label)

    def _note_update(self, step: int) -> None:
        if not self._updates.is_due(step):
            return
        noted = self._updates.note(step, self._layers.local_weights())
        if noted is not None:
            measured_step, values = noted
            count = len(values) // 2
            self._update_ring.send(torch.cat([self._layers.whole(values[:count]), values[count:]]), measured_step)

    def _collect(self, *, wait: bool = False) -> None:
        for label, values in self._ring.collect(wait=wait):
            self._keep(label, values)
        for step, values in self._update_ring.collect(wait=wait):
            whole, ratios = np.split(values.astype(np.float64), 2)
            self._emit(UpdatesMeasured(step, self._rank, tuple(whole.tolist()), tuple(ratios.tolist())))
        self._flush_pending()

    def _keep(self, label: StepLabel, values: NDArray[np.float32]) -> None:
        count = len(label.present)
        norms = values[:count].astype(np.float64)
        local = np.zeros(count if label.local_order else 0, np.float32)
        local[label.local_order] = values[count : count + len(label.local_order)]
        loss = float(values[-1]) if label.has_loss else None
        kinds = self._judge(norms, label.present)
        anomalous = kinds >= 0
        self._statistics.add(norms, anomalous)
        self._timeline.append(TimelineStep(label.step, label.at, norms, anomalous))
        self._total_steps += 1
        self._emit_norms(label, norms, kinds)
        if self._spool is None:
            return
        compute_ms = elapsed_ms(label.begin, label.ready)
        dropped = self.num_dropped + self._spool.num_dropped
        self._emit(
            RankGradientsRecorded(
                step=label.step,
                rank=self._rank,
                norms=tuple(local.tolist()),
                loss=loss,
                step_time_ms=label.step_time_ms,
                compute_time_ms=compute_ms,
                num_samples=label.num_samples,
                is_scaled=label.is_scaled,
                num_dropped=dropped,
                num_rollbacks=label.num_rollbacks,
            )
        )
        if label.learning_rate is not None and loss is not None:
            self._emit_from_first_rank(label.as_metric(loss, norms))

    def _emit_norms(self, label: StepLabel, norms: NDArray[np.float64], kinds: NDArray[np.int8]) -> None:
        found = np.flatnonzero(kinds >= 0).tolist()
        self._emit_from_first_rank(
            GradientsRecorded(label.step, tuple(norms.tolist()), tuple(found), label.num_rollbacks)
        )
        if not found:
            return
        names, named = self.names, [ANOMALY_KINDS[kinds[index]] for index in found]
        for kind in named:
            self._anomalies[kind] += 1
        layers = list(zip(found, named, strict=True))[:MAX_NAMED_ANOMALIES]
        self._emit_from_first_rank(
            AnomaliesFound(label.step, tuple(LayerAnomaly(names[i], kind, float(norms[i])) for i, kind in layers))
        )

    def _judge(self, norms: NDArray[np.float64], present: NDArray[np.bool_]) -> NDArray[np.int8]:
        """Return index into `ANOMALY_KINDS` for each layer; -1: fine."""
        if ((norms >= self._vanishing_below) & (norms <= self._exploding_above) | ~present).all():
            return np.full(len(norms), -1, np.int8)
        conditions = [
            ~present,
            np.isnan(norms),
            np.isinf(norms),
            norms > self._exploding_above,
            norms < self._vanishing_below,
        ]
        return np.select(conditions, [-1, 0, 1, 2, 3], -1).astype(np.int8)

    def _emit_order(self, step: int, order: list[int]) -> None:
        self._num_orders += 1
        if self._num_orders == ORDER_SETTLED_AT:
            self._emit_from_first_rank(BackwardOrderSeen(step, tuple(order)))

    def _emit_from_first_rank(self, event: Event) -> None:
        if self._rank == 0:
            self._emit(event)

    def _emit(self, event: Event) -> None:
        if self._spool is not None:
            self._pending.append(event)

    def _flush_pending(self) -> None:
        if self._spool is not None and self._pending:
            self._spool.append(*self._pending)
            self._pending.clear()
