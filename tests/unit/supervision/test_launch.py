"""What the ranks find in their environment."""

from pathlib import Path

from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.supervision.launch import _environment
from tests.integration.run_files import run_file_in


def test_what_was_compiled_is_kept_in_the_data_directory_for_all_jobs(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    of_jobs = [
        _environment(settings, run_file_in(tmp_path / name, TrainSpec(kind="train", device="cpu")), [])
        for name in ("one", "two")
    ]
    assert {found["TORCHINDUCTOR_CACHE_DIR"] for found in of_jobs} == {str(settings.root / "compile_cache")}
