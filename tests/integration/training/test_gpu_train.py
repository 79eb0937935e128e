"""`benchmarks/gpu_train.py` as it fits on a CPU: the product's own trainer and its peer run and are timed."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_trainer_and_the_bare_loop_are_timed_in_one_run(tmp_path: Path) -> None:
    output = tmp_path / "gpu_train.jsonl"
    command = [
        *(sys.executable, "-m", "benchmarks.gpu_train", "--device=cpu", "--parts", "speed", "monitor"),
        *("--variants", "fast", "--blocks=1", "--pairs=1", f"--output={output}"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    speed, monitor = (json.loads(line) for line in output.read_text().splitlines())
    assert all(milliseconds > 0 for run in ("bare", "fast") for milliseconds in speed[run]["step_ms"])
    assert len(monitor["pairs_s"]) == 1
    assert "| tiny | ours, deterministic: false |" in done.stdout
