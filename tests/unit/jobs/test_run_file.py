"""The run file keeps its content and names the files of an attempt."""

from pathlib import Path

from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec


def test_a_run_file_survives_json_and_names_the_attempts_files(tmp_path: Path) -> None:
    run_file = RunFile(
        job_id="job_x",
        attempt=2,
        spec=TrainSpec(kind="train"),
        entry_point=None,
        dataset_file=None,
        base_model_dir=None,
        resume_dir=tmp_path / "old",
        run_dir=tmp_path,
        checkpoints_dir=tmp_path / "checkpoints",
        checkpoint_prefix="job_x",
    )
    assert RunFile.model_validate_json(run_file.model_dump_json()) == run_file
    assert run_file.spool_path(3) == tmp_path / "rank-3.spool"
    assert run_file.stop_path == tmp_path / "stop"
    assert run_file.outcome_path == tmp_path / "outcome"
