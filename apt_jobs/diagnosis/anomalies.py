"""Find what is wrong with a step, outside the training process: fixed thresholds, and baselines of each layer.

Per layer: not finite; beyond SPEC's thresholds; a spike (its log norm is above what its newest values let expect, alone
or with its whole block, by more than the larger of some usual errors and a factor); vanished (far below its median for
many steps). Look per layer: a fault in one layer hardly shows in the norm over all of them.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import median

from apt_jobs.diagnosis.baselines import Baseline
from apt_jobs.diagnosis.incidents import Finding, numbered_block_of
from apt_jobs.diagnosis.rank_anomalies import RankDetector
from apt_jobs.diagnosis.step_join import JoinedStep
from apt_jobs.events.kinds import UpdatesMeasured
from apt_jobs.jobs.monitor_options import IncidentKind, MonitorOptions

MAX_OVERFLOWS = 5  # steps in a row that a loss scaler may skip before it is an incident
UPDATE_RATIO = 8.0  # an update ratio is a spike at so many times the largest of the last few
UPDATES_COMPARED = 4
MIN_COMPANIONS = 3  # layers of a block of which it can be said what they share


class AnomalyDetector:
    """Find anomalies of one attempt. Steps come in order."""

    def __init__(self, options: MonitorOptions, num_ranks: int) -> None:
        self._options = options
        self._names: tuple[str, ...] = ()
        self._baselines: list[Baseline] = []
        self._companions: list[list[int]] = []  # layers of one block each, and those outside of all blocks
        self._backward_index: dict[int, int] = {}  # of each layer in the backward pass
        self._ranks = RankDetector(options, num_ranks)
        self._num_overflows = 0
        self._ratios: list[list[float]] = []

    @property
    def num_layers(self) -> int:
        return len(self._names)

    def name_layers(self, names: tuple[str, ...]) -> None:
        """Set the layers, in the order of all norms; further ones may be added at the end."""
        for _ in names[len(self._names) :]:
            self._baselines.append(Baseline(self._options))
            self._ratios.append([])
        if len(self._backward_index) < len(names):
            self._backward_index = {index: len(names) - index for index in range(len(names))}
        self._names = names
        self._companions = _companions(names)

    def order_layers(self, order: Sequence[int]) -> None:
        """Set the order in which the backward pass really goes."""
        self._backward_index = {layer: index for index, layer in enumerate(order)}

    def detect(self, joined: JoinedStep) -> list[Finding]:
        """Return what is wrong with a step of all ranks."""
        nonfinite = self._nonfinite(joined)
        self._num_overflows = self._num_overflows + 1 if nonfinite else 0
        if nonfinite:
            is_scaled = any(record.is_scaled for record in joined.ranks.values())
            return [] if is_scaled and self._num_overflows <= MAX_OVERFLOWS else nonfinite
        return [*self._layers(joined), *self._ranks.detect(joined, self._names)]

    def detect_in_updates(self, updates: Sequence[UpdatesMeasured]) -> list[Finding]:
        """Return what is wrong with an update that all ranks measured."""
        return [*self._ranks.detect_in_weights(updates, self._names), *self._update_spikes(updates)]

    def _nonfinite(self, joined: JoinedStep) -> list[Finding]:
        found: dict[IncidentKind, tuple[list[int], list[int]]] = {}
        for rank, record in sorted(joined.ranks.items()):
            for index, norm in enumerate(record.norms):
                if not math.isfinite(norm):
                    layers, ranks = found.setdefault("nan" if math.isnan(norm) else "inf", ([], []))
                    layers.append(index)
                    ranks.append(rank)
            if record.loss is not None and not math.isfinite(record.loss):
                found.setdefault("nan" if math.isnan(record.loss) else "inf", ([], []))[1].append(rank)
        is_known = bool(found)  # on which rank; what is left of it after the average is no news
        for index, norm in enumerate(joined.gradients.norms if joined.gradients else ()):
            if not math.isfinite(norm) and not is_known:
                found.setdefault("nan" if math.isnan(norm) else "inf", ([], []))[0].append(index)
        return [self._as_finding(kind, layers, ranks, joined) for kind, (layers, ranks) in found.items()]

    def _as_finding(self, kind: IncidentKind, layers: list[int], ranks: list[int], joined: JoinedStep) -> Finding:
        ordered = sorted(set(layers), key=lambda index: self._backward_index.get(index, len(self._names)))
        names = tuple(self._name(index) for index in ordered)
        culprits = tuple(sorted(set(ranks)))
        forward = [r for r in culprits if (loss := joined.ranks[r].loss) is not None and not math.isfinite(loss)]
        where = f" on rank {', '.join(map(str, culprits))}" if culprits else ""
        began = "in the forward pass: the loss is not finite" if forward else f"in the backward pass at {names[0]}"
        value = math.nan if kind == "nan" else math.inf
        origin = names[0] if names and not forward else None
        return Finding(kind, names, culprits, origin, value, None, f"{len(names)} layers{where}; it began {began}")

    def _layers(self, joined: JoinedStep) -> list[Finding]:
        if joined.gradients is None:
            return []
        options, outside = self._options, set(joined.gradients.anomalous)
        spikes: list[tuple[float, int]] = []
        vanished: list[int] = []
        exploding: list[int] = []
        vanishing: list[int] = []
        norms = joined.gradients.norms
        errors = [baseline.error(norm) for norm, baseline in zip(norms, self._baselines, strict=False)]
        shared = self._shared(errors)
        for index, (norm, baseline) in enumerate(zip(norms, self._baselines, strict=False)):
            if baseline.has_vanished(norm, options.vanished_ratio, options.vanished_steps):
                vanished.append(index)
            beyond = baseline.judge(norm, errors[index], shared[index])
            if beyond > 0.0:
                spikes.append((beyond, index))
            if index in outside:
                (exploding if norm > options.exploding_above else vanishing).append(index)
        found = [
            ("spike", [index for _, index in sorted(spikes, reverse=True)]),
            ("exploding", sorted(exploding, key=lambda index: -norms[index])),
            ("vanished", vanished),
            ("vanishing", sorted(vanishing, key=lambda index: norms[index])),
        ]
        return [self._finding(kind, layers, norms) for kind, layers in found if layers]  # type: ignore[arg-type]  # literals

    def _shared(self, errors: Sequence[float | None]) -> list[float]:
        """Return the part of each layer's error that the layers of its block have in common: their median."""
        shared = [0.0] * len(errors)
        for companions in self._companions:
            known = [error for index in companions if index < len(errors) and (error := errors[index]) is not None]
            if len(known) >= MIN_COMPANIONS:
                middle = median(known)
                for index in companions:
                    if index < len(errors):
                        shared[index] = middle
        return shared

    def _finding(self, kind: IncidentKind, layers: list[int], norms: Sequence[float]) -> Finding:
        options, worst = self._options, layers[0]
        is_fixed = kind in ("exploding", "vanishing")
        fixed = options.vanishing_below, options.exploding_above
        expected = fixed if is_fixed else self._baselines[worst].expected()
        names = tuple(self._name(index) for index in layers)
        message = f"{names[0]} is {_compared(norms[worst], expected, 'allowed' if is_fixed else 'usual')}"
        return Finding(kind, names, (), None, norms[worst], expected, message)

    def _update_spikes(self, updates: Iterable[UpdatesMeasured]) -> list[Finding]:
        first = next((update for update in updates if update.rank == 0), None)
        found: list[tuple[float, int, float]] = []
        for index, ratio in enumerate(first.update_ratios if first else ()):
            before = self._ratios[index]
            if len(before) == UPDATES_COMPARED and 0.0 < max(before) * UPDATE_RATIO < ratio:
                found.append((ratio / max(before), index, max(before)))
            before.append(ratio)
            del before[:-UPDATES_COMPARED]
        if not found or first is None:
            return []
        found.sort(reverse=True)
        times, worst, usual = found[0]
        ratio = first.update_ratios[worst]
        message = f"{self._name(worst)} moved by {ratio:.3g} of its size in one step, {times:.0f} times what was usual"
        names = tuple(self._name(index) for _, index, _ in found)
        return [Finding("update_spike", names, (), None, ratio, (0.0, usual * UPDATE_RATIO), message)]

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else f"layer {index}"


def _companions(names: Sequence[str]) -> list[list[int]]:
    groups: dict[str | None, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(numbered_block_of(name), []).append(index)
    return list(groups.values())


def _compared(norm: float, expected: tuple[float, float] | None, word: str) -> str:
    """Describe how far a norm is from its range."""
    if expected is not None and norm > expected[1]:
        return f"{norm / expected[1]:.3g} times the {word} maximum"
    if expected is not None and 0.0 < norm < expected[0]:
        return f"1/{expected[0] / norm:.3g} of the {word} minimum"
    return f"{norm:.3g}"
