"""Policies without a service: real ranks, their spools, the supervisor's judgement, and what the ranks do."""

import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.diagnosis.rank_watch import RankWatch
from apt_jobs.events.kinds import (
    ActionTaken,
    CheckpointRemoved,
    CheckpointSaved,
    Event,
    GradientsRecorded,
    IncidentChanged,
    StepTrained,
)
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.commands import write_commands
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from tests.integration.run_files import run_file_in
from tests.integration.training.struck_weights import STRUCK_AFTER_STEPS

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 200.0
EDGY = {"window_steps": 8, "arm_after_steps": 8, "spike_ratio": 1.01, "spike_mads": 0.01}  # anything is a spike to it
SPEC: dict[str, Any] = {
    "kind": "train",
    "num_ranks": 2,
    "device": "cpu",
    "model": {"d_model": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 32},
    "training": {
        "epochs": 100,
        "batch_size": 2,
        "warmup_steps": 2,
        "validation_fraction": 0.0,
        "checkpoint_every_steps": 5,
        "keep_checkpoints": 100,
    },
}


def trained(folder: Path, monitor: dict[str, Any], entry_point: str | None = None, max_steps: int = 150) -> list[Event]:
    """Train under policies; what is to be stored."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "text.txt").write_text("A short text that is trained on, over and over again.\n" * 300)
    training = {**SPEC["training"], "max_steps": max_steps}
    run_file = run_file_in(
        folder,
        TrainSpec.model_validate({**SPEC, "training": training, "monitor": monitor}),
        entry_point=entry_point,
        dataset_file=folder / "text.txt",
    )
    (folder / "run.json").write_text(run_file.model_dump_json())
    command = [
        *(sys.executable, "-m", "apt_jobs.training.launch_ranks", "--nproc-per-node=2", "--rdzv-backend=apt-jobs"),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "apt_jobs.training.run"),
        *("--run-file", str(folder / "run.json")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as ranks:
        events = follow(run_file, ranks)
        assert ranks.stderr is not None
        assert ranks.returncode == 0, ranks.stderr.read()[-3000:]
    return events


def edgy(**policy: Any) -> dict[str, Any]:
    """A monitor that finds something soon, and what is to be done about it."""
    return {**EDGY, "on_anomaly": [{"kinds": ["spike"], **policy}]}


def follow(run_file: RunFile, ranks: "subprocess.Popen[bytes]") -> list[Event]:
    """Do what the relay does, but for the database."""
    watch, readers = RankWatch(run_file.spec), [SpoolReader(run_file.spool_path(rank)) for rank in range(2)]
    events: list[Event] = []
    num_commands = 0
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        is_over = ranks.poll() is not None
        for reader in readers:
            for at, event in reader.read():
                events += [result for _, result in watch.add(at, event)]
        if len(watch.commands) > num_commands:
            num_commands = len(watch.commands)
            write_commands(run_file.commands_path, watch.commands)
        if is_over:
            break
        time.sleep(0.01)
    return events + [event for _, event in watch.end()]


def of(events: list[Event], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_a_rollback_goes_on_from_before_the_incident_with_other_batches(tmp_path: Path) -> None:
    events = trained(tmp_path, edgy(action="rollback", skip_steps=7))
    ordered, done = of(events, ActionTaken)
    assert (ordered.phase, done.phase, done.action, done.incident) == ("ordered", "done", "rollback", ordered.incident)
    began = next(event.began_step for event in of(events, IncidentChanged) if event.incident == ordered.incident)
    steps = [event.step for event in of(events, StepTrained)]
    turn = next(number for number, (step, after) in enumerate(pairwise(steps)) if after <= step)
    back_to = steps[turn + 1] - 1
    assert back_to < began
    assert back_to % 5 == 0
    assert steps == [*range(1, steps[turn] + 1), *range(back_to + 1, 151)]
    assert f"went back from step {steps[turn]} to {back_to}" in done.reason
    assert f"the batches of {steps[turn] - back_to + 7} steps are skipped" in done.reason
    removed = {event.checkpoint_id for event in of(events, CheckpointRemoved)}
    assert removed == {event.checkpoint_id for event in of(events, CheckpointSaved)[: len(removed) + back_to // 5]} - {
        event.checkpoint_id for event in of(events, CheckpointSaved)[: back_to // 5]
    }
    again = [event.step for event in of(events, GradientsRecorded) if event.num_rollbacks == 1]
    assert again == list(range(back_to + 1, 151))


def test_a_run_that_would_have_died_finishes(tmp_path: Path) -> None:
    """A weight is struck on one rank: without a policy no later step counts, with one the run goes back and on."""
    struck = "tests.integration.training.struck_weights:train"
    dead = of(trained(tmp_path / "dead", {}, struck, 60), StepTrained)
    assert all(math.isnan(event.train_loss) for event in dead if event.step > STRUCK_AFTER_STEPS)
    policy = {"kinds": ["nan", "inf"], "action": "rollback", "skip_steps": 1}
    events = trained(tmp_path / "alive", {"on_anomaly": [policy]}, struck, 60)
    assert [event.phase for event in of(events, ActionTaken)] == ["ordered", "done"]
    alive = of(events, StepTrained)
    assert alive[-1].step == 60
    assert alive[-1].train_loss < 0.9 * alive[0].train_loss
    (incident,) = (event for event in of(events, IncidentChanged) if event.phase == "begun")
    assert (incident.anomaly, incident.ranks, incident.began_step) == ("nan", (1,), STRUCK_AFTER_STEPS + 1)


def test_a_cut_of_the_learning_rate_lasts(tmp_path: Path) -> None:
    events = trained(tmp_path, edgy(action="cut_lr", factor=0.5))
    assert [event.phase for event in of(events, ActionTaken)] == ["ordered", "done"]
    done_at = of(events, ActionTaken)[1].step
    rates = {event.step: event.learning_rate for event in of(events, StepTrained)}
    assert rates[done_at + 1] == pytest.approx(0.5 * rates[done_at], rel=0.02)
    assert rates[150] == pytest.approx(0.5 * 1e-4, rel=0.05)


def test_a_checkpoint_is_saved_when_asked_for(tmp_path: Path) -> None:
    events = trained(tmp_path, edgy(action="checkpoint", patience_steps=1))
    done = of(events, ActionTaken)[1]
    assert (done.phase, done.reason) == ("done", f"a checkpoint of step {done.step} is saved")
    assert done.step in {event.step for event in of(events, CheckpointSaved)}
