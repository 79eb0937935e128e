"""The checks of `benchmarks/gpu_ranks.py` that fit on a CPU: norms of each rank in every way to train, over gloo."""

import json
from pathlib import Path

from benchmarks.torchrun import run_ranks


def test_norms_of_each_rank_are_those_of_float64_in_every_way_to_train(tmp_path: Path) -> None:
    output = tmp_path / "norms.json"
    model = ("--num-layers=1", "--width=16", "--length=8", "--vocabulary-size=32")
    run_ranks(2, "benchmarks.rank_norms", "--device=cpu", *model, f"--output={output}", timeout_s=240)
    checked = json.loads(output.read_text())
    assert len(checked) == 8
    assert [case["case"] for case in checked if not case["is_right"]] == []
    assert all((case["local_error"] is None) == case["case"].startswith("FSDP2") for case in checked)
