"""Group findings into incidents: an event when one begins, at most one a second while it lasts, one at its end.

Findings of one kind in one block of the model (or on one rank) are one incident; a quarter of all layers at once is one
for the whole model; while values are not finite, other findings are muted.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from apt_jobs.events.kinds import IncidentChanged
from apt_jobs.jobs.monitor_options import IncidentKind

GLOBAL_SHARE = 0.25  # of the layers: more at once are one global incident
MAX_LAYERS_NAMED = 16
UPDATE_EVERY_S = 1.0
NON_FINITE: frozenset[IncidentKind] = frozenset({"nan", "inf"})
ALL_LAYERS = "all layers"
_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong at one step."""

    anomaly: IncidentKind
    layers: tuple[str, ...]  # worst first; empty: not about layers
    ranks: tuple[int, ...] = ()
    origin: str | None = None
    value: float | None = None
    expected: tuple[float, float] | None = None
    message: str = ""


@dataclass(slots=True)
class _Incident:
    number: int
    group: str
    finding: Finding  # the first one: it is nearest to the cause
    began_step: int
    step: int
    num_steps: int
    ranks: set[int]
    num_layers: int
    emitted_at: datetime


class IncidentLog:
    """The open incidents of one attempt."""

    def __init__(self, quiet_steps: int) -> None:
        self._quiet_steps = quiet_steps
        self._open: dict[tuple[IncidentKind, str], _Incident] = {}
        self._num_incidents = 0

    def step(
        self, step: int, at: datetime, findings: Sequence[Finding], num_layers: int, *, closes: bool = True
    ) -> Iterator[IncidentChanged]:
        """Yield the events of one step. With `closes` False no incident ends: not everything was measured."""
        is_nonfinite = any(kind in NON_FINITE for kind, _ in self._open)
        is_nonfinite = is_nonfinite or any(finding.anomaly in NON_FINITE for finding in findings)
        for finding in findings:
            if is_nonfinite and finding.anomaly not in NON_FINITE:
                continue
            for group, part in _groups(finding, num_layers):
                yield from self._add(step, at, group, part)
        if closes:
            yield from self._close(step)

    def open(self) -> list[IncidentChanged]:
        """Return the incidents that are open now."""
        return [_event(incident, "updated") for incident in self._open.values()]

    def end(self) -> Iterator[IncidentChanged]:
        """End all incidents: the attempt has ended or was rolled back."""
        for incident in self._open.values():
            yield _event(incident, "ended")
        self._open.clear()

    def _add(self, step: int, at: datetime, group: str, finding: Finding) -> Iterator[IncidentChanged]:
        whole = self._open.get((finding.anomaly, ALL_LAYERS))
        incident = whole or self._open.get((finding.anomaly, group))
        if incident is None:
            self._num_incidents += 1
            incident = _Incident(
                number=self._num_incidents,
                group=group,
                finding=finding,
                began_step=step,
                step=step,
                num_steps=1,
                ranks=set(finding.ranks),
                num_layers=len(finding.layers),
                emitted_at=at,
            )
            self._open[finding.anomaly, group] = incident
            yield _event(incident, "begun")
            return
        incident.num_steps += step > incident.step
        incident.step = step
        incident.ranks |= set(finding.ranks)
        incident.num_layers = max(incident.num_layers, len(finding.layers))
        if (at - incident.emitted_at).total_seconds() >= UPDATE_EVERY_S:
            incident.emitted_at = at
            yield _event(incident, "updated")

    def _close(self, step: int) -> Iterator[IncidentChanged]:
        over = [key for key, incident in self._open.items() if step - incident.step >= self._quiet_steps]
        for key in over:
            yield _event(self._open.pop(key), "ended")


def block_of(layer: str) -> str:
    """Return the part of the model that a layer belongs to: `model.layers.2` of `model.layers.2.mlp.up_proj.weight`."""
    return numbered_block_of(layer) or layer.rpartition(".")[0] or layer


def numbered_block_of(layer: str) -> str | None:
    """Return the repeated block that a layer belongs to; None if it is outside of them."""
    found = _BLOCK.match(layer)
    return found[1] if found else None


def _groups(finding: Finding, num_layers: int) -> Iterator[tuple[str, Finding]]:
    """Yield the group of each incident that a finding belongs to, with its part of the finding."""
    if finding.anomaly in NON_FINITE or len(finding.layers) > max(GLOBAL_SHARE * num_layers, 1):
        yield ALL_LAYERS, finding
        return
    if (finding.ranks and finding.anomaly in ("rank_outlier", "straggler", "desync")) or not finding.layers:
        yield "rank " + ", ".join(map(str, finding.ranks)), finding
        return
    blocks: dict[str, list[str]] = {}
    for layer in finding.layers:
        blocks.setdefault(block_of(layer), []).append(layer)
    for block, layers in blocks.items():
        is_worst = layers[0] == finding.layers[0]
        value, expected = (finding.value, finding.expected) if is_worst else (None, None)
        yield (
            block,
            Finding(finding.anomaly, tuple(layers), finding.ranks, finding.origin, value, expected, finding.message),
        )


def _event(incident: _Incident, phase: Literal["begun", "updated", "ended"]) -> IncidentChanged:
    finding = incident.finding
    low, high = finding.expected or (None, None)
    return IncidentChanged(
        incident=incident.number,
        phase=phase,
        anomaly=finding.anomaly,
        group=incident.group,
        began_step=incident.began_step,
        step=incident.step,
        num_steps=incident.num_steps,
        layers=finding.layers[:MAX_LAYERS_NAMED],
        num_layers=incident.num_layers,
        ranks=tuple(sorted(incident.ranks)),
        origin=finding.origin,
        value=finding.value,
        expected_low=low,
        expected_high=high,
        message=finding.message,
    )
