"""Find the rank that differs from the others: in its gradients, loss, speed or weights.

After DDP has averaged, all ranks look alike; everything here is from before that, or from weights that should be equal.
With two ranks "the other one" cannot tell who is wrong: then it is the rank that left its own past.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from apt_jobs.diagnosis.baselines import Window
from apt_jobs.diagnosis.incidents import Finding
from apt_jobs.diagnosis.step_join import JoinedStep
from apt_jobs.events.kinds import RankGradientsRecorded, UpdatesMeasured
from apt_jobs.jobs.monitor_options import MonitorOptions

OUTLIER_STEPS = 3  # of the last OUTLIER_WINDOW
OUTLIER_WINDOW = 10
HABIT_STEPS = 6  # a layer of a rank that was apart so often half a window ago always is: no fault
MANY_RANKS = 6
STRAGGLER_SHARE = 0.9  # of `straggler_steps`
MIN_LAG_MS = 5.0  # a rank that is behind by less may have lost no more than a time slice of the operating system
MIN_LOSS_GAP = 0.5  # nats: below it a rank's loss is never an outlier
WEIGHT_TOLERANCE = 1e-6  # relative, while the ranks never agreed to the last bit: different GPUs add differently
CLEARLY = 10.0  # of two ranks one left, if its weights moved by so many times what the other's did


@dataclass(slots=True)
class _Past:
    """The recent past of one rank."""

    gap: Window  # median over layers of log(own norm / norm of the others)
    loss_gap: Window
    others_loss: Window  # median loss of the other ranks
    size: Window  # log of the total norm
    weights: tuple[float, ...] = ()
    apart: deque[bool] = field(default_factory=lambda: deque(maxlen=OUTLIER_WINDOW))
    loss_apart: deque[bool] = field(default_factory=lambda: deque(maxlen=OUTLIER_WINDOW))
    slow: deque[bool] = field(default_factory=deque)


class RankDetector:
    """Compare the ranks of one attempt, if there are at least two."""

    def __init__(self, options: MonitorOptions, num_ranks: int) -> None:
        self._options, self._num_ranks = options, num_ranks
        window = partial(Window, options.window_steps)
        self._past = [
            _Past(gap=window(), loss_gap=window(), others_loss=window(), size=window()) for _ in range(num_ranks)
        ]
        for past in self._past:
            past.slow = deque(maxlen=options.straggler_steps)
        self._habits: dict[tuple[int, int], deque[int]] = {}  # (rank, layer): numbers of steps on which it was apart
        self._num_steps = 0
        self._sums_are_equal = False  # once all layers had the same norms to the last bit on all ranks

    def detect(self, joined: JoinedStep, names: Sequence[str]) -> list[Finding]:
        """Return outliers and stragglers at one step on which all values are finite."""
        if self._num_ranks < 2 or len(joined.ranks) < self._num_ranks:
            return []
        self._num_steps += 1
        records = [joined.ranks[rank] for rank in range(self._num_ranks)]
        by_loss = self._losses(records)
        by_gradients = self._gradients(records, names) if all(record.norms for record in records) else []
        return [*(by_gradients or by_loss), *self._stragglers(records)]

    def detect_in_weights(self, updates: Sequence[UpdatesMeasured], names: Sequence[str]) -> list[Finding]:
        """Return the ranks whose weights are no longer equal to the others'."""
        if self._num_ranks < 2 or len(updates) < self._num_ranks:
            return []
        ordered = sorted(updates, key=lambda update: update.rank)
        apart: dict[tuple[int, ...], list[int]] = {}
        layers = list(zip(*(update.weight_norms for update in ordered), strict=False))
        for index, norms in enumerate(layers):
            if self._differ(norms):
                apart.setdefault(self._diverged_ranks(index, norms), []).append(index)
        for past, update in zip(self._past, ordered, strict=True):
            past.weights = update.weight_norms
        self._sums_are_equal |= all(len(set(norms)) == 1 for norms in layers)
        return [self._desync(ranks, indexes, ordered, names) for ranks, indexes in apart.items()]

    def _differ(self, norms: Sequence[float]) -> bool:
        """Return whether weights that should be equal differ: bitwise, if the ranks' machines sum in the same order."""
        if self._sums_are_equal:
            return len(set(norms)) > 1
        return max(norms) - min(norms) > WEIGHT_TOLERANCE * max(norms) or not all(map(math.isfinite, norms))

    def _diverged_ranks(self, index: int, norms: Sequence[float]) -> tuple[int, ...]:
        """Return the rank whose weights are not the median's; of two the one that left its own past, else both."""
        middle = sorted(norms)[len(norms) // 2] if len(norms) > 2 else None

        def distance(rank: int) -> float:
            before = self._past[rank].weights
            usual = middle if middle is not None else before[index] if index < len(before) else 0.0
            gap = abs(norms[rank] - usual)
            return gap if math.isfinite(gap) else math.inf

        nearest, *_, farthest = sorted(range(len(norms)), key=distance)
        if middle is None and distance(farthest) <= CLEARLY * distance(nearest):
            return tuple(range(len(norms)))
        return (farthest,)

    def _desync(
        self, ranks: tuple[int, ...], layers: list[int], updates: Sequence[UpdatesMeasured], names: Sequence[str]
    ) -> Finding:
        who = (
            f"rank {ranks[0]} differ from the other ranks'"
            if len(ranks) == 1
            else "the ranks differ (whose is unknown)"
        )
        worst = tuple(names[index] for index in layers)
        value = updates[ranks[-1]].weight_norms[layers[0]]
        return Finding("desync", worst, ranks, value=value, message=f"the weights of {who} in {len(layers)} layers")

    def _gradients(self, records: list[RankGradientsRecorded], names: Sequence[str]) -> list[Finding]:
        logs = [[math.log(norm) if norm > 0.0 else None for norm in record.norms] for record in records]
        gaps: list[list[tuple[float, int]]] = [[] for _ in records]  # of each rank: (gap, layer)
        for index, column in enumerate(zip(*logs, strict=False)):
            known = [value for value in column if value is not None]
            if len(known) == len(column):
                for rank, gap in enumerate(_gaps(known)):
                    gaps[rank].append((gap, index))
        sizes = [math.log(total) if (total := math.hypot(*record.norms)) > 0.0 else None for record in records]
        found = self._whole_ranks(gaps, sizes, names) or self._single_layers(gaps, sizes, names)
        for past, size in zip(self._past, sizes, strict=True):
            if size is not None:
                past.size.add(size)
        return found

    def _whole_ranks(
        self, gaps: list[list[tuple[float, int]]], sizes: list[float | None], names: Sequence[str]
    ) -> list[Finding]:
        options, far = self._options, []
        for rank, (past, of_rank) in enumerate(zip(self._past, gaps, strict=True)):
            gap = sorted(value for value, _ in of_rank)[len(of_rank) // 2] if of_rank else 0.0
            is_far, kept = _beyond(past.gap, gap, math.log(options.rank_ratio), options.rank_mads, options)
            past.gap.add(kept)
            past.apart.append(is_far)
            if is_far and sum(past.apart) >= OUTLIER_STEPS:
                far.append((rank, gap))
        if self._num_ranks == 2 and far:
            far = [max(far, key=lambda entry: self._is_suspect(entry[0], sizes[entry[0]]))]
        return [self._outlier(rank, gap, sorted(gaps[rank], key=lambda g: -abs(g[0])), names) for rank, gap in far]

    def _single_layers(
        self, gaps: list[list[tuple[float, int]]], sizes: list[float | None], names: Sequence[str]
    ) -> list[Finding]:
        min_gap, found = math.log(self._options.rank_ratio), []
        for rank, of_rank in enumerate(gaps):
            apart = [(gap, index) for gap, index in of_rank if gap > min_gap and self._is_new(rank, index)]
            if apart:
                found.append(self._outlier(rank, max(apart)[0], sorted(apart, reverse=True), names))
        return found

    def _is_new(self, rank: int, index: int) -> bool:
        """Return whether this layer of this rank is apart often enough now, and was not before."""
        steps = self._habits.setdefault((rank, index), deque(maxlen=self._options.window_steps))
        steps.append(self._num_steps)
        long_ago = self._num_steps - self._options.window_steps // 2
        now = sum(step > self._num_steps - OUTLIER_WINDOW for step in steps)
        before = sum(step <= long_ago for step in steps)
        return now >= OUTLIER_STEPS and before < HABIT_STEPS and long_ago > max(OUTLIER_WINDOW, HABIT_STEPS)

    def _outlier(self, rank: int, gap: float, layers: list[tuple[float, int]], names: Sequence[str]) -> Finding:
        limit = math.log(self._options.rank_ratio)
        worst = tuple(names[index] for value, index in layers if abs(value) > limit or value == layers[0][0])
        times = f"{math.exp(gap):.3g} times" if gap > 0 else f"1/{math.exp(-gap):.3g} of"
        message = f"the gradients of rank {rank} are {times} those of the other ranks, before they are averaged"
        expected = (1.0 / self._options.rank_ratio, self._options.rank_ratio)
        return Finding("rank_outlier", worst, (rank,), None, math.exp(gap), expected, message)

    def _losses(self, records: list[RankGradientsRecorded]) -> list[Finding]:
        losses = [record.loss for record in records if record.loss is not None]
        found: list[Finding] = []
        if len(losses) < self._num_ranks:
            return found
        for rank, past in enumerate(self._past):
            others = _median_of_others(losses, rank)
            gap = losses[rank] - others
            # When the others' loss has grown too, the model is off, and every batch fits it badly in its own way.
            grown = others - past.others_loss.median if len(past.others_loss) else 0.0
            past.others_loss.add(others)
            min_gap = max(MIN_LOSS_GAP, 0.1 * abs(others), grown)
            is_far, kept = _beyond(past.loss_gap, gap, min_gap, self._options.rank_mads, self._options)
            past.loss_gap.add(kept)
            past.loss_apart.append(is_far and gap > 0.0)
            if past.loss_apart[-1] and sum(past.loss_apart) >= OUTLIER_STEPS:
                message = f"the loss of rank {rank} is {losses[rank]:.3g}, of the others {others:.3g}"
                found.append(Finding("rank_outlier", (), (rank,), None, losses[rank], None, message))
        return found

    def _stragglers(self, records: list[RankGradientsRecorded]) -> list[Finding]:
        times = [record.compute_time_ms for record in records if record.compute_time_ms is not None]
        found: list[Finding] = []
        if len(times) < self._num_ranks:
            return found
        for rank, past in enumerate(self._past):
            others = _median_of_others(times, rank)
            limit = max(self._options.straggler_ratio * others, others + MIN_LAG_MS)
            past.slow.append(times[rank] > limit)
            if past.slow[-1] and sum(past.slow) >= STRAGGLER_SHARE * self._options.straggler_steps:
                message = (
                    f"rank {rank} computes for {times[rank]:.0f} ms a step, the others {others:.0f}; they wait for it"
                )
                found.append(Finding("straggler", (), (rank,), None, times[rank], (0.0, limit), message))
        return found

    def _is_suspect(self, rank: int, size: float | None) -> tuple[bool, float]:
        """Score the evidence against one of two ranks that differ: its recent loss, then the distance from its past."""
        past = self._past[rank]
        gone = abs(size - past.size.median) if size is not None and len(past.size) else 0.0
        return sum(past.loss_apart) >= OUTLIER_STEPS, gone


def _beyond(past: Window, value: float, min_limit: float, mads: float, options: MonitorOptions) -> tuple[bool, float]:
    """Return whether `value` is outside its usual range, and what to remember of it (winsorised)."""
    if len(past) < options.arm_after_steps:
        return False, value
    limit = max(mads * past.mad(), min_limit)
    gap = value - past.median
    if abs(gap) <= limit:
        return False, value
    return True, past.median + math.copysign(limit, gap)


def _gaps(values: Sequence[float]) -> list[float]:
    """Return each rank's distance from the others' median; of many ranks, from the median of all."""
    if len(values) < MANY_RANKS:
        return [value - _median_of_others(values, rank) for rank, value in enumerate(values)]
    median = sorted(values)[len(values) // 2]
    return [value - median for value in values]


def _median_of_others(values: Sequence[float], rank: int) -> float:
    others = sorted(value for other, value in enumerate(values) if other != rank)
    middle = len(others) // 2
    return others[middle] if len(others) % 2 else 0.5 * (others[middle - 1] + others[middle])
