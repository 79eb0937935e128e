"""How fast the built-in trainer is: tokens a second and MFU on one GPU, against a bare compiled Hugging Face loop.

    python -m benchmarks.gpu_train [--shapes 124M 888M] [--parts speed monitor resume]

(speed) the trainer as a job runs it (torchrun, `apt_jobs.training.run`, a run file, the monitor at work), with and
without repeatable operations, and `benchmarks/bare_loop.py` before and after it;
(monitor) one training whose monitor works in some blocks of ten steps (`benchmarks/alternating_monitor.py`);
(resume) a compiled training that goes on from a checkpoint ends bit by bit where the one without a break did.
On a CPU (`--device cpu`) all of it is tiny. Besides the project's `events`, `jobs` and `training` it needs PyTorch,
transformers, numpy, orjson and pydantic.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from apt_jobs.events.kinds import LineLogged, RankFailed, StepTrained
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from benchmarks.alternating_monitor import BLOCK_STEPS, is_monitored
from benchmarks.intervals import bootstrap

PEAK_FLOPS = 989e12  # an H200 in dense bf16, by its data sheet
WARM_UP_STEPS = 20
DEADLINE_S = 150.0
POLL_S = 0.1
RESUMED_STEPS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama and its batch."""

    name: str
    model: dict[str, Any]
    batch_size: int

    @property
    def tokens(self) -> int:
        """Of one step."""
        length: int = self.model["max_seq_len"]
        return self.batch_size * length

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward, with causal attention (Chowdhery et al. 2022, appendix B; attention halved)."""
        config = APTConfig.model_validate(self.model)
        return 6.0 * config.num_parameters + 6.0 * config.num_layers * config.d_model * config.max_seq_len

    def mfu(self, step_ms: float) -> float:
        """Share of the GPU's peak."""
        return 1000.0 * self.tokens / step_ms * self.flops_per_token / PEAK_FLOPS


def _model(width: int, layers: int, heads: int, hidden: int, vocabulary: int, length: int) -> dict[str, Any]:
    return {
        "d_model": width,
        "num_layers": layers,
        "num_attention_heads": heads,
        "d_ff": hidden,
        "vocab_size": vocabulary,
        "max_seq_len": length,
    }


SHAPES = {
    "124M": Shape("124M", _model(768, 12, 12, 2048, 50_304, 1_024), 16),
    "888M": Shape("888M", _model(2_048, 16, 16, 5_632, 32_000, 2_048), 8),
}
TINY = Shape("tiny", _model(16, 1, 2, 32, 300, 32), 2)


class Runs:
    """Trainings in `folder`, one after another, each in a folder of its own; one cache of what is compiled."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._number = 0
        self.is_tiny = options.device == "cpu"
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1" if options.device == "cpu" else "8",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "compile_cache"),
        }

    def run_file(self, shape: Shape, *, resume_dir: Path | None = None, **options: Any) -> RunFile:
        """Plan a training; `options` of it, and `num_ranks`, `entry_point` and `arguments` of the job."""
        self._number += 1
        run_dir = self._folder / f"run-{self._number}"
        (run_dir / "checkpoints").mkdir(parents=True)
        entry_point, arguments = options.pop("entry_point", None), options.pop("arguments", {})
        usual = {"epochs": 100_000, "max_steps": 100_000, "batch_size": shape.batch_size, "validation_fraction": 0.0}
        compile_option = {} if self._options.compile is None else {"compile": self._options.compile}
        spec = TrainSpec.model_validate(
            {
                "kind": "train",
                "device": self._options.device,
                "num_ranks": options.pop("num_ranks", 1),
                "model": {**shape.model, **options.pop("model", {})},
                "arguments": arguments,
                "training": {**usual, "checkpoint_every_steps": 100_000, **compile_option, **options},
            }
        )
        return RunFile(
            job_id="benchmark",
            attempt=1,
            spec=spec,
            entry_point=entry_point,
            resume_dir=resume_dir,
            run_dir=run_dir,
            checkpoints_dir=run_dir / "checkpoints",
            checkpoint_prefix="benchmark",
        )

    def steps(self, run_file: RunFile, num_steps: int, *, to_the_end: bool = False) -> tuple[dict[int, float], float]:
        """Train until so many steps are reported, then end the ranks. Returns when each step was done and the start.

        Raises:
            RuntimeError: the training failed; the message says why.
        """
        path = run_file.run_dir / "run.json"
        path.write_text(run_file.model_dump_json())
        command = [
            *(sys.executable, "-m", "apt_jobs.training.launch_ranks", "--rdzv-backend=apt-jobs"),
            *(f"--nproc-per-node={run_file.spec.num_ranks}", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *("-m", "apt_jobs.training.run", "--run-file", str(path)),
        ]
        reader, done_at, began = SpoolReader(run_file.spool_path(0)), dict[int, float](), time.time()
        with (run_file.run_dir / "log").open("w") as log:
            ranks = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
            try:
                while len(done_at) < num_steps:
                    is_over = ranks.poll() is not None
                    for at, event in reader.read():
                        if isinstance(event, StepTrained):
                            done_at[event.step] = at.timestamp()
                        elif isinstance(event, RankFailed | LineLogged):
                            print(f"({event})"[:2_000], flush=True)
                    if is_over or time.time() - began > DEADLINE_S:
                        break
                    time.sleep(POLL_S)
                if to_the_end:
                    ranks.wait(DEADLINE_S)
            finally:
                ranks.terminate()
                ranks.wait()
        if len(done_at) < num_steps:
            output = (run_file.run_dir / "log").read_text()[-4_000:]
            raise RuntimeError(f"{len(done_at)} of {num_steps} steps were trained\n{output}")
        return done_at, began

    def bare(self, shape: Shape) -> dict[str, Any]:
        """Run the peer; returns what it wrote."""
        output = self._folder / "bare.json"
        command = [
            *(sys.executable, "-m", "benchmarks.bare_loop", f"--model={json.dumps(shape.model)}"),
            *(f"--batch-size={shape.batch_size}", f"--device={self._options.device}", f"--output={output}"),
            f"--blocks={self._options.blocks}",
            *(["--eager"] if self._options.device == "cpu" else []),
        ]
        subprocess.run(command, env=self._environment, check=True, timeout=DEADLINE_S)
        recorded: dict[str, Any] = json.loads(output.read_text())
        return recorded


def main() -> None:
    """Run the parts and print their tables; exit status 1 if a resumed training differs."""
    options = _options()
    shapes = [TINY] if options.device == "cpu" else [SHAPES[name] for name in options.shapes]
    what = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{what}, PyTorch {torch.__version__}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    is_right = True
    with tempfile.TemporaryDirectory() as folder, options.output.open("a") as file:
        runs = Runs(Path(folder), options)
        for shape in shapes:
            for part in options.parts:
                began = time.monotonic()
                try:
                    recorded = PARTS[part](runs, shape, options)
                except (RuntimeError, subprocess.SubprocessError) as exc:  # the other parts are worth their time
                    recorded = {"is_right": False, "error": str(exc)}
                    print(f"\n{exc}", flush=True)
                file.write(json.dumps({"part": part, "shape": shape.name, **recorded}) + "\n")
                file.flush()
                is_right &= recorded.get("is_right", True)
                print(f"\n({part}, {shape.name}: {time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(0 if is_right else "a part failed, or the resumed training differs")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--blocks", type=int, default=6, help="of ten steps each, of every training that is timed")
    parser.add_argument("--pairs", type=int, default=20, help="of blocks with and without the monitor")
    parser.add_argument("--compile", choices=("auto", "on", "off"), help="of the trainer; default: as a job has it")
    parser.add_argument("--variants", nargs="*", choices=tuple(VARIANTS), default=["deterministic", "fast"])
    parser.add_argument("--output", type=Path, default=Path("build/gpu_train.jsonl"))
    return parser.parse_args()


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deterministic": ("ours, as a job is by default", {}),
    "fast": ("ours, deterministic: false", {"deterministic": False}),
    "chunks": (
        "ours, deterministic: false, loss in small chunks",
        {
            "deterministic": False,
            "entry_point": "benchmarks.alternating_monitor:train_tuned",
            "arguments": {"chunk_logits": 1 << 27},
        },
    ),
    "uncaptured": (
        "ours, deterministic: false, no CUDA graph",
        {"deterministic": False, "entry_point": "benchmarks.alternating_monitor:train_uncaptured"},
    ),
}


def _speed(runs: Runs, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    print("\n| shape | what | ms a step | tokens/s | MFU | ratio to the bare loop | first step after |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    recorded = runs.bare(shape)
    bare_ms = statistics.median(recorded["step_ms"])
    _row(shape, "bare loop, compiled whole", bare_ms, bare_ms, recorded["first_step_s"])
    result = {"bare": recorded}
    for name in options.variants:
        label, fields = VARIANTS[name]
        num_steps = WARM_UP_STEPS + BLOCK_STEPS * options.blocks
        done_at, began = runs.steps(runs.run_file(shape, **fields), num_steps)
        blocks = step_times_ms(done_at)
        result[name] = {"step_ms": blocks, "first_step_s": done_at[1] - began}
        _row(shape, label, statistics.median(blocks), bare_ms, done_at[1] - began)
    return result


def step_times_ms(done_at: dict[int, float]) -> list[float]:
    """Return the time of a step in each block of ten behind the warm-up."""
    ends = range(WARM_UP_STEPS + BLOCK_STEPS, max(done_at) + 1, BLOCK_STEPS)
    return [100.0 * (done_at[end] - done_at[end - BLOCK_STEPS]) for end in ends]


def _row(shape: Shape, label: str, step_ms: float, bare_ms: float, first_s: float) -> None:
    rate = 1000.0 * shape.tokens / step_ms
    numbers = f"{step_ms:.2f} | {rate:,.0f} | {100.0 * shape.mfu(step_ms):.1f} % | {bare_ms / step_ms:.3f}"
    print(f"| {shape.name} | {label} | {numbers} | {first_s:.1f} s |", flush=True)


def compare_monitor(runs: Runs, shape: Shape, options: argparse.Namespace, **fields: Any) -> dict[str, Any]:
    """Print what the monitor costs in a training of the job's `fields`; returns the pairs and their ratio."""
    run_file = runs.run_file(shape, deterministic=False, entry_point="benchmarks.alternating_monitor:train", **fields)
    num_steps = WARM_UP_STEPS + 2 * BLOCK_STEPS * options.pairs
    done_at, _ = runs.steps(run_file, num_steps)
    pairs: list[tuple[float, float]] = []
    for begin in range(WARM_UP_STEPS, num_steps, 2 * BLOCK_STEPS):
        middle, end = begin + BLOCK_STEPS, begin + 2 * BLOCK_STEPS
        times = done_at[middle] - done_at[begin], done_at[end] - done_at[middle]
        pairs.append(times if is_monitored(middle) else (times[1], times[0]))
    ratio = bootstrap([with_it / without for with_it, without in pairs])
    host = json.loads((run_file.run_dir / "alternating.json").read_text())
    with_ms, without_ms = (100.0 * statistics.median(times) for times in zip(*pairs, strict=True))
    print("\n| shape | unmonitored ms | monitored ms | ratio | 95 % interval | pairs | host ms a step | dropped |")
    print("|---|---|---|---|---|---|---|---|")
    interval = f"{ratio.median:.4f} | {ratio.low:.4f} to {ratio.high:.4f} | {len(pairs)}"
    recorded = f"{host['host_ms']:.2f} | {host['num_dropped']}"
    print(f"| {shape.name} | {without_ms:.2f} | {with_ms:.2f} | {interval} | {recorded} |", flush=True)
    return {"pairs_s": pairs, "ratio": [ratio.median, ratio.low, ratio.high], **host}


def _resume(runs: Runs, shape: Shape, _: argparse.Namespace) -> dict[str, Any]:
    half_steps = RESUMED_STEPS // 2
    fields: dict[str, Any] = {"max_steps": RESUMED_STEPS, "checkpoint_every_steps": half_steps}
    smaller = {} if runs.is_tiny else {"num_layers": 2, "vocab_size": 8_192}
    fields |= {"model": {"dropout": 0.1, **smaller}, "gradient_accumulation_steps": 2}
    whole = runs.run_file(shape, **fields)
    runs.steps(whole, RESUMED_STEPS, to_the_end=True)
    whole_dir, half_dir = (whole.checkpoints_dir / f"step-{step:08d}-a1" for step in (RESUMED_STEPS, half_steps))
    resumed = runs.run_file(shape, resume_dir=half_dir, **fields)
    runs.steps(resumed, RESUMED_STEPS - half_steps, to_the_end=True)
    uncaptured = runs.run_file(shape, entry_point="benchmarks.alternating_monitor:train_uncaptured", **fields)
    runs.steps(uncaptured, RESUMED_STEPS, to_the_end=True)
    result: dict[str, Any] = {}
    for name, run_file in {"resumed at half": resumed, "without a CUDA graph": uncaptured}.items():
        different = _different(whole_dir, run_file.checkpoints_dir / whole_dir.name)
        print(f"\n{name}: {len(different)} tensors differ after {RESUMED_STEPS} steps {different[:5]}", flush=True)
        result[name] = different
    return {"is_right": not result["resumed at half"], **result}


def _different(folder: Path, other: Path) -> list[str]:
    different = list[str]()
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(other / path.name)
        tensors = load_file(path).items()
        different += [f"{path.name}: {name}" for name, tensor in tensors if not torch.equal(tensor, found[name])]
    return different


PARTS = {"speed": _speed, "monitor": compare_monitor, "resume": _resume}


if __name__ == "__main__":
    main()
