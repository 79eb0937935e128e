"""Folding keeps the last value, the extremes, and everything that matters."""

from typing import Any

from apt_jobs.events.conflation import Conflation


def metric(seq: int, loss: float | str) -> dict[str, Any]:
    return {"seq": seq, "kind": "metric", "attempt": 1, "at": "t", "step": seq, "epoch": 0, "train_loss": loss}


def gradient(seq: int, norms: list[float | str], anomalous: list[int]) -> dict[str, Any]:
    event = {"seq": seq, "kind": "gradient", "attempt": 1, "at": "t", "step": seq}
    return {**event, "norms": norms, "anomalous": anomalous}


def folded(*events: dict[str, Any]) -> list[dict[str, Any]]:
    conflation = Conflation()
    for event in events:
        conflation.add(event)
    taken = conflation.pop()
    assert conflation.pop() == []
    return taken


def test_one_event_stays_as_it_is() -> None:
    assert folded(metric(1, 2.0)) == [metric(1, 2.0)]


def test_the_last_value_stays_with_the_extremes() -> None:
    [event] = folded(metric(1, 3.0), metric(2, "NaN"), metric(3, 5.0), metric(4, 4.0))
    assert (event["seq"], event["train_loss"]) == (4, 4.0)
    summary = {"count": 4, "first_seq": 1, "min": {"train_loss": 3.0}, "max": {"train_loss": 5.0}}
    assert event["conflated"] == summary


def test_norms_are_folded_layer_by_layer() -> None:
    [event] = folded(gradient(1, [1.0, 5.0], []), gradient(2, [3.0, "Infinity"], [1]), gradient(3, [2.0, 4.0], []))
    assert (event["norms"], event["anomalous"]) == ([2.0, 4.0], [1])
    assert (event["conflated"]["min"], event["conflated"]["max"]) == ({"norms": [1.0, 4.0]}, {"norms": [3.0, 5.0]})


def test_layers_that_changed_begin_again() -> None:
    [event] = folded(gradient(1, [1.0], []), gradient(2, [3.0, 1.0], []))
    assert event["conflated"]["min"] == {"norms": [3.0, 1.0]}


def test_anomalies_and_states_are_never_folded() -> None:
    state = {"seq": 2, "kind": "state", "state": "running"}
    anomalies: list[dict[str, Any]] = [{"seq": seq, "kind": "anomaly", "step": seq, "layers": []} for seq in (3, 5)]
    logs = [{"seq": seq, "kind": "log", "message": str(seq)} for seq in (1, 4)]
    events = folded(logs[0], state, anomalies[0], logs[1], anomalies[1])
    assert [event["seq"] for event in events] == [2, 3, 4, 5]
    assert events[2]["conflated"] == {"count": 2, "first_seq": 1, "min": {}, "max": {}}
