"""The files that processes of an attempt leave for each other: commands, states of checkpoints, shares, outcomes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.jobs.checkpoint_state import (
    STATE_FILE,
    Adjustments,
    CheckpointEntry,
    CheckpointState,
    read_checkpoint_state,
    write_checkpoint_state,
)
from apt_jobs.jobs.commands import RankCommand, read_commands, write_commands
from apt_jobs.jobs.node_share import NodeShare, ShareState, read_share, write_share
from apt_jobs.jobs.outcome import Outcome, read_outcome, write_outcome
from apt_jobs.jobs.spec import TrainSpec
from tests.integration.run_files import run_file_in

COMMAND = RankCommand("rollback", 3, 40, 7, 0.5, "spike since step 40")


def test_commands_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "commands.json"
    assert read_commands(path) == []
    write_commands(path, [COMMAND])
    write_commands(path, [COMMAND, COMMAND])
    assert read_commands(path) == [COMMAND, COMMAND]
    assert [file.name for file in tmp_path.iterdir()] == ["commands.json"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"action": "explode"}]', '[{"action": "cut_lr"}]'])
def test_a_file_that_holds_no_commands_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "commands.json").write_text(text)
    with pytest.raises(ValidationError):
        read_commands(tmp_path / "commands.json")


def test_the_state_of_a_checkpoint_is_read_as_it_was_written_infinities_included(tmp_path: Path) -> None:
    state = CheckpointState(
        global_step=5,
        train_loss=math.inf,
        best_val_loss=1.25,
        kept=[CheckpointEntry("ckpt_a", "step-3", True, 3)],
        adjustments=Adjustments(0.5, 7, 0),
        monitor={"statistics": {"a": [1.0, -math.inf, 1 << 60]}},
        optimizer_groups=[{"lr": 0.1, "betas": [0.9, 0.95], "params": ["a"], "foreach": None}],
        checkpoint_id="ckpt_b",
        name="step-5",
    )
    write_checkpoint_state(tmp_path, state)
    assert read_checkpoint_state(tmp_path) == state
    assert state.as_entry() == CheckpointEntry("ckpt_b", "step-5", False, 5)
    write_checkpoint_state(tmp_path, state.model_copy(update={"train_loss": math.nan}))
    assert math.isnan(read_checkpoint_state(tmp_path).train_loss or 0.0)


def test_a_state_of_an_earlier_version_is_read_with_defaults(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(json.dumps({"global_step": 3, "kept": [], "of_the_future": 1}))
    state = read_checkpoint_state(tmp_path)
    assert (state.global_step, state.adjustments) == (3, Adjustments())


@pytest.mark.parametrize(
    "document", [None, "", "[]", "{}", {"global_step": "x"}, {"global_step": 1, "kept": [{}]}, {"global_step": 1e300}]
)
def test_a_damaged_state_says_which_field_is_wrong(tmp_path: Path, document: Any) -> None:
    if document is not None:
        (tmp_path / STATE_FILE).write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(InvalidCheckpoint, match="checkpoint '"):
        read_checkpoint_state(tmp_path)


def test_the_share_of_a_node_is_read_as_it_was_written(tmp_path: Path) -> None:
    run_file = run_file_in(tmp_path, TrainSpec(kind="train", num_nodes=2, num_ranks=2))
    assert read_share(run_file, 1) is None
    write_share(run_file, 1, ShareState.JOINED)
    assert read_share(run_file, 1) == NodeShare(state=ShareState.JOINED)
    write_share(run_file, 1, ShareState.ENDED_EARLY, "its ranks were ended")
    assert read_share(run_file, 1) == NodeShare(state=ShareState.ENDED_EARLY, reason="its ranks were ended")


def test_an_outcome_is_one_of_two_words(tmp_path: Path) -> None:
    path = tmp_path / "outcome"
    assert read_outcome(path) is None
    for outcome in Outcome:
        write_outcome(path, outcome)
        assert read_outcome(path) is outcome
    path.write_text("finis")
    assert read_outcome(path) is None
