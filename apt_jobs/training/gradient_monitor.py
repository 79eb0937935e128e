"""The gradient monitor: the norm of every layer's gradient at every step, what is wrong with it, and the history.

In any PyTorch loop:

    monitor = GradientMonitor(model)
    loss.backward(); total_norm = monitor.step(step)   # before clipping and before the optimizer
    monitor.export_for_webui()

One fused norm computation a step for all layers and no collective. After DDP's all-reduce the gradients, and so the
norms, are the same on every rank, so nothing need be exchanged for the log: mismatched collectives in a logger hang
trainings.
`sync_gradients_distributed` and `aggregate_anomalies_distributed` are there for gradients that were not reduced.
On a GPU the norms are copied to pinned memory asynchronously and read when they are there: the host never waits.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import finite_or_name
from apt_jobs.events.kinds import AnomaliesFound, AnomalyKind, GradientsRecorded, LayerAnomaly, LayersNamed
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.training.parallel import local_part

RING_SLOTS = 4  # steps whose norms may still be on their way from a GPU
MAX_TIMELINE_STEPS = 1_000  # kept in memory for `export_for_webui`; the spool has all
ANOMALY_KINDS: tuple[AnomalyKind, ...] = ("nan", "inf", "exploding", "vanishing")


@dataclass(slots=True)
class _Statistics:
    """Running mean and variance of one layer's finite norms (Welford 1962)."""

    num_finite: int = 0
    mean: float = 0.0
    sum_squares: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    total_steps: int = 0
    anomaly_count: int = 0

    def add(self, norm: float, *, is_anomaly: bool) -> None:
        self.total_steps += 1
        self.anomaly_count += is_anomaly
        if math.isfinite(norm):
            self.num_finite += 1
            delta = norm - self.mean
            self.mean += delta / self.num_finite
            self.sum_squares += delta * (norm - self.mean)
            self.least, self.most = min(self.least, norm), max(self.most, norm)

    def export(self) -> dict[str, Any]:
        known = self.num_finite > 0
        return {
            "mean": self.mean if known else None,
            "std": math.sqrt(self.sum_squares / self.num_finite) if known else None,
            "min": self.least if known else None,
            "max": self.most if known else None,
            "total_steps": self.total_steps,
            "anomaly_count": self.anomaly_count,
        }


@dataclass(slots=True)
class _Slot:
    """Norms of one step on their way to the host."""

    host: Tensor  # pinned float32 [layer]
    event: Any  # torch.cuda.Event
    step: int = 0
    at: float = 0.0
    busy: bool = False


@dataclass(slots=True)
class _Record:
    step: int
    timestamp: float
    norms: list[float]
    anomalous: list[int] = field(default_factory=list)


class GradientMonitor:
    """Watches the gradients of `model`'s trainable parameters ("layers", by name).

    Args:
        model: the module whose `named_parameters` are watched. Shared parameters count once, frozen ones not at all.
        spool: where to write events; give it to rank 0 only. None: only memory.
        vanishing_below, exploding_above: norms outside are anomalies; NaN and Inf always are.

    Raises:
        InvalidInput: the ranks disagree on the set of layers (raised on every rank).
    """

    def __init__(
        self,
        model: nn.Module,
        spool: SpoolWriter | None = None,
        *,
        vanishing_below: float = 1e-7,
        exploding_above: float = 1e3,
    ) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = tuple(name.removeprefix("module.") for name, _ in named)
        self._parameters = [parameter for _, parameter in named]
        if not self.names:
            raise InvalidInput("the model has no trainable parameter: there is no gradient to watch")
        self._device = self._parameters[0].device
        self._is_sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters)
        _require_same_layers(self.names, self._device)
        self._spool = spool
        self._vanishing_below, self._exploding_above = vanishing_below, exploding_above
        self._timeline: deque[_Record] = deque(maxlen=MAX_TIMELINE_STEPS)
        self._statistics = [_Statistics() for _ in self.names]
        self._anomalies = dict.fromkeys(ANOMALY_KINDS, 0)
        self._total_steps = 0
        self._norms: Tensor | None = None  # [layer], of the last step
        self._ring = self._make_ring() if self._device.type == "cuda" else []
        self.num_dropped = 0  # steps whose norms could not be kept, as the GPU was too far ahead
        if spool is not None:
            spool.append(LayersNamed(self.names))

    def step(self, step: int, scale: float = 1.0) -> Tensor:
        """Record the gradients as they are now, and return their total L2 norm (scalar, on the device, unscaled).

        Call it on every rank after `backward` and before clipping. `scale` is the AMP loss scale, by which gradients
        are multiplied while they are recorded. A layer without a gradient counts as 0 and never as an anomaly.
        """
        norms, has_gradient = self._measure(scale)
        self._norms = norms
        if self._ring:
            self._collect()
            self._send(step, norms)
        else:
            self._keep(step, time.time(), norms.tolist(), has_gradient)
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def flush(self) -> None:
        """Wait for the norms that are still on their way: call it at the end, not in the loop."""
        for slot in sorted((slot for slot in self._ring if slot.busy), key=lambda slot: slot.step):
            slot.event.synchronize()
        self._collect()

    @torch.no_grad()
    def sync_gradients_distributed(self) -> dict[str, float]:
        """The last step's global norm of each layer, the same on every rank: the root mean square over the ranks.

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
        """Anomalies of each kind, summed over the ranks. Called by every rank; one collective."""
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
                        name: {"norm": finite_or_name(norm), "is_anomaly": index in record.anomalous}
                        for index, (name, norm) in enumerate(zip(self.names, record.norms, strict=True))
                    },
                }
                for record in self._timeline
            ],
            "layer_statistics": {
                name: statistics.export() for name, statistics in zip(self.names, self._statistics, strict=True)
            },
            "anomaly_summary": {kind: count for kind, count in self._anomalies.items() if count},
            "total_steps": self._total_steps,
            "timestamp": time.time(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON: statistics and counts, not the timeline."""
        self.flush()
        return {
            "total_steps": self._total_steps,
            "anomalies": dict(self._anomalies),
            "statistics": {
                name: [
                    *(entry.num_finite, entry.mean, entry.sum_squares),
                    *(entry.least if entry.num_finite else None, entry.most if entry.num_finite else None),
                    *(entry.total_steps, entry.anomaly_count),
                ]
                for name, entry in zip(self.names, self._statistics, strict=True)
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where `state_dict` stopped. Layers that it does not know begin at zero."""
        self._total_steps = state["total_steps"]
        self._anomalies.update(state["anomalies"])
        for index, name in enumerate(self.names):
            if name in state["statistics"]:
                finite, mean, squares, least, most, total, anomalies = state["statistics"][name]
                least, most = math.inf if least is None else least, -math.inf if most is None else most
                self._statistics[index] = _Statistics(finite, mean, squares, least, most, total, anomalies)

    @torch.no_grad()
    def _measure(self, scale: float) -> tuple[Tensor, list[bool]]:
        """Float32 norm of each layer [layer] on the device, and which layers have a gradient."""
        gradients = [parameter.grad for parameter in self._parameters]
        present = [_dense(local_part(gradient)) for gradient in gradients if gradient is not None and gradient.numel()]
        has_gradient = [gradient is not None and gradient.numel() > 0 for gradient in gradients]
        norms = torch.zeros(len(gradients), device=self._device)
        if present:
            measured = torch.stack(torch._foreach_norm(present, 2, dtype=torch.float32))
            if len(present) == len(gradients):
                norms = measured
            else:
                norms[torch.tensor(has_gradient, device=self._device)] = measured
        if self._is_sharded:  # each rank has a part of every layer: the one collective, of all layers at once
            squares = norms.double().square()
            dist.all_reduce(squares)
            norms = squares.sqrt().float()
        return norms if scale == 1.0 else norms / scale, has_gradient

    def _keep(self, step: int, at: float, norms: list[float], has_gradient: Iterable[bool]) -> None:
        found = [
            (index, kind)
            for index, (norm, present) in enumerate(zip(norms, has_gradient, strict=True))
            if present and (kind := self._judge(norm)) is not None
        ]
        record = _Record(step, at, norms, [index for index, _ in found])
        anomalous = set(record.anomalous)
        for index, norm in enumerate(norms):
            self._statistics[index].add(norm, is_anomaly=index in anomalous)
        for _, kind in found:
            self._anomalies[kind] += 1
        self._timeline.append(record)
        self._total_steps += 1
        if self._spool is not None:
            self._spool.append(GradientsRecorded(step, tuple(norms), tuple(record.anomalous)))
            if found:
                layers = tuple(LayerAnomaly(self.names[index], kind, norms[index]) for index, kind in found)
                self._spool.append(AnomaliesFound(step, layers))

    def _judge(self, norm: float) -> AnomalyKind | None:
        if math.isnan(norm):
            return "nan"
        if math.isinf(norm):
            return "inf"
        if norm > self._exploding_above:
            return "exploding"
        return "vanishing" if norm < self._vanishing_below else None

    def _make_ring(self) -> list[_Slot]:
        size = len(self.names)
        event: Callable[[], Any] = torch.cuda.Event  # torch leaves it untyped
        return [_Slot(torch.empty(size, pin_memory=True), event()) for _ in range(RING_SLOTS)]

    def _send(self, step: int, norms: Tensor) -> None:
        slot = next((slot for slot in self._ring if not slot.busy), None)
        if slot is None:
            self.num_dropped += 1
            return
        slot.host.copy_(norms, non_blocking=True)
        slot.event.record()
        slot.step, slot.at, slot.busy = step, time.time(), True

    def _collect(self) -> None:
        for slot in sorted((slot for slot in self._ring if slot.busy), key=lambda slot: slot.step):
            if not slot.event.query():
                return
            norms = slot.host.tolist()
            has_gradient = [
                parameter.grad is not None or norm != 0.0
                for parameter, norm in zip(self._parameters, norms, strict=True)
            ]
            slot.busy = False
            self._keep(slot.step, slot.at, norms, has_gradient)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _require_same_layers(names: tuple[str, ...], device: torch.device) -> None:
    """Compare a hash of the names over the ranks, so that no rank waits for another's later collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digest = int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:7], "big")
    mine = torch.tensor([digest], dtype=torch.int64, device=device)
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    different = [rank for rank, other in enumerate(all_ranks) if other.item() != all_ranks[0].item()]
    if different:
        raise InvalidInput(f"ranks {different} have other layers than rank 0; every rank must build the same model")
