"""How many tokens a second the generation engine makes of a 135M Llama, against transformers' continuous batching.

    python -m benchmarks.gpu_generate              # on a GPU: 1, 8, 32 and 128 rows
    python -m benchmarks.gpu_generate --small      # on CPU, in small form: does it run, and do the tokens agree?

Random weights, a prompt of 64 tokens, 128 new ones, greedy, bfloat16 on a GPU. Needs torch and transformers only. Times
are of the whole request, its prefill included; the engine is measured on its first graphs and again on compiled ones.
"adapters": the rows take turns among four LoRA adapters of rank 16 beside the model (graphs, never compiled).
"""

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from apt_jobs.generation import graphs
from apt_jobs.generation.adapter_bank import Adapter, AdapterBank, AdapterKey
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.probe import make_runner, slot_difference
from apt_jobs.generation.runner import SlotRunner
from apt_jobs.generation.scheduler import Scheduler
from apt_jobs.generation.sequences import Handle, SamplingParams, Sequence

REPEATS = 5
COMPILE_DEADLINE_S = 240.0


def llama(*, small: bool) -> LlamaForCausalLM:
    """Return the 135M shape (SmolLM's): 30 layers of 576, 9 heads, 3 key/value heads, 49,152 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512 if small else 49_152,
        hidden_size=48 if small else 576,
        intermediate_size=128 if small else 1_536,
        num_hidden_layers=2 if small else 30,
        num_attention_heads=6 if small else 9,
        num_key_value_heads=2 if small else 3,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]  # the library's
    return model


class NoTokenizer:
    """The engine works on tokens; a model without a tokenizer has no special ones."""

    bos_token_id = None
    eos_token_id = None
    model_max_length = 2_048

    def encode(self, text: str, **_: Any) -> list[int]:
        return [0]


def load(device: torch.device, *, small: bool, dtype: torch.dtype | None = None) -> LoadedModel:
    """Return the model where it runs."""
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = llama(small=small).to(device, dtype)  # type: ignore[arg-type]  # typed for one argument
    return LoadedModel.of(Path("llama-135m"), model, cast(PreTrainedTokenizerBase, NoTokenizer()))


class EngineRun:
    """The scheduler and its runner, driven as the engine's thread drives them."""

    def __init__(self, model: LoadedModel, max_rows: int, *, compile_graphs: bool) -> None:
        self.model = model
        self.runner = make_runner(model, max_rows=max_rows, compile_graphs=compile_graphs)
        self.scheduler = Scheduler(self.runner, "llama-135m", prefill_tokens=16_384)

    def generate(
        self, prompts: list[list[int]], num_new: int, adapters: list[Adapter] | None = None, **params: Any
    ) -> tuple[list[list[int]], float, float]:
        """Return tokens of each prompt, seconds to the first token of all, seconds in all. Rows share adapters."""
        started_s = time.perf_counter()
        first_s: list[float] = []
        handle = Handle()
        sequences = [
            Sequence(prompt, SamplingParams(max_tokens=num_new, **params), self.model.context_tokens, handle.push)
            for prompt in prompts
        ]
        for row, sequence in enumerate(sequences if adapters else []):
            sequence.adapter = adapters[row % len(adapters)] if adapters else None
        for sequence in sequences:
            self.scheduler.submit(sequence)
        while self.scheduler.has_work:
            self.scheduler.step()
            if not first_s and all(each.output_ids for each in sequences):
                first_s.append(time.perf_counter() - started_s)
        total_s = time.perf_counter() - started_s
        assert all(len(each.output_ids) == num_new for each in sequences)
        return [each.output_ids for each in sequences], first_s[0], total_s

    def measure(self, prompts: list[list[int]], num_new: int, **params: Any) -> dict[str, float]:
        """Return medians."""
        runs = [self.generate(prompts, num_new, **params)[1:] for _ in range(REPEATS)]
        total_s = statistics.median(run[1] for run in runs)
        first_s = statistics.median(run[0] for run in runs)
        return {
            "tokens_per_s": round(len(prompts) * num_new / total_s, 1),
            "first_token_ms": round(first_s * 1e3, 2),
            "step_ms": round((total_s - first_s) / (num_new - 1) * 1e3, 3),
        }

    def wait_for_compiler(self) -> None:
        """Wait until everything that was asked for is compiled or refused."""
        deadline_s = time.monotonic() + COMPILE_DEADLINE_S
        while isinstance(self.runner, SlotRunner) and self.runner.is_compiling and time.monotonic() < deadline_s:
            time.sleep(0.1)


def prompts_of(model: LoadedModel, num_rows: int, num_tokens: int) -> list[list[int]]:
    """Return random prompts, the same in each run."""
    generator = torch.Generator().manual_seed(num_rows)
    tokens: list[list[int]] = torch.randint(
        1, model.vocabulary_size, (num_rows, num_tokens), generator=generator
    ).tolist()
    return tokens


def random_adapters(model: LoadedModel, number: int = 4, rank: int = 16) -> list[Adapter]:
    """Place adapters of all linear layers but the last beside a model."""
    bank, head = AdapterBank(model.model), cast(Any, model.model).get_output_embeddings()
    layers = {name: one for name, one in model.model.named_modules() if isinstance(one, torch.nn.Linear)}
    adapters = []
    for slot in range(1, number + 1):
        generator = torch.Generator().manual_seed(slot)
        matrices = {
            name: (
                torch.randn((one.in_features, rank), generator=generator) / rank,
                torch.randn((rank, one.out_features), generator=generator) * 0.01,
            )
            for name, one in layers.items()
            if one is not head
        }
        bank.write(slot, matrices)
        adapters.append(Adapter(AdapterKey((Path(f"adapter-{slot}"),), ()), model, matrices, bank, slot))
    return adapters


def agreement(model: LoadedModel, prompts: list[list[int]], found: list[list[int]], num_new: int) -> float:
    """Share of the greedy tokens that equal those of `generate`, each row up to its first difference."""
    with torch.inference_mode():
        ids = torch.tensor(prompts, device=model.device)
        output = cast(Any, model.model).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new
        )
    right = output[:, ids.shape[1] :].tolist()
    same = 0
    for row, other in zip(found, right, strict=True):
        same += next((n for n, (one, two) in enumerate(zip(row, other, strict=True)) if one != two), num_new)
    return same / (num_new * len(found))


def continuous_batching(device: torch.device, prompts: list[list[int]], num_new: int, *, small: bool) -> float | None:
    """Return tokens a second of transformers' own continuous batching; none if it does not run here."""
    model = cast(Any, load(device, small=small).model)
    config = GenerationConfig(  # type: ignore[no-untyped-call]  # the library's
        do_sample=False, max_new_tokens=num_new, use_cuda_graph=device.type == "cuda"
    )
    config.eos_token_id = -1
    config.pad_token_id = 0
    best = 0.0
    try:
        for _ in range(3):  # the first has its warm-up
            started_s = time.perf_counter()
            outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
            num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
            best = max(best, num_tokens / (time.perf_counter() - started_s))
    except Exception as exc:
        print(f"continuous batching does not run here: {exc!r}"[:500], file=sys.stderr)
        return None
    return round(best, 1)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--rows", type=int, nargs="+", default=None, help="default: 1 8 32 128; small: 1 3")
    parser.add_argument("--no-compile", action="store_true", help="stay on the first graphs")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers' continuous batching out")
    parser.add_argument("--tuned-rows", type=int, default=graphs.TUNED_ROWS, help="compile so few rows as reductions")
    parser.add_argument("--out", type=Path, default=None, help="write the numbers as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the library's
    graphs.TUNED_ROWS = options.tuned_rows
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = options.rows or ([1, 3] if options.small else [1, 8, 32, 128])
    num_prompt, num_new = (9, 8) if options.small else (64, 128)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "probe_difference": slot_difference(load(device, small=options.small)),
        "rows": {},
    }
    reference = load(device, small=options.small)
    run = EngineRun(load(device, small=options.small), max(rows), compile_graphs=False)
    adapters = random_adapters(run.model)
    for num_rows in rows:
        prompts = prompts_of(reference, num_rows, num_prompt)
        started_s = time.perf_counter()
        found, first_s, _ = run.generate(prompts, num_new)
        entry: dict[str, Any] = {"cold_s": round(time.perf_counter() - started_s, 2), "cold_first_s": round(first_s, 2)}
        entry["agreement"] = round(agreement(reference, prompts, found, num_new), 3)
        entry["graphs" if device.type == "cuda" else "eager"] = run.measure(prompts, num_new)
        entry["sampled"] = run.measure(prompts, num_new, temperature=0.8, top_p=0.95, top_k=50)
        entry["adapters"] = run.measure(prompts, num_new, adapters=adapters)
        report["rows"][num_rows] = entry
        print(num_rows, json.dumps(entry), flush=True)
    run.runner.close()
    report["fp32"] = _agreement_in_fp32(device, small=options.small)
    print("fp32", json.dumps(report["fp32"]), flush=True)
    if device.type == "cuda" and not options.no_compile:
        _measure_compiled(device, reference, rows, num_prompt, num_new, report)
    if not options.no_peer:
        report["continuous_batching"] = {
            num_rows: continuous_batching(
                device, prompts_of(reference, num_rows, num_prompt), num_new, small=options.small
            )
            for num_rows in ([rows[0], rows[-1]] if len(rows) > 1 else rows)
        }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))
    return report


def _agreement_in_fp32(device: torch.device, *, small: bool) -> dict[str, float]:
    """Without the ties of 16 bits: 1.0 unless something is wrong."""
    reference = load(device, small=small, dtype=torch.float32)
    run = EngineRun(load(device, small=small, dtype=torch.float32), 8, compile_graphs=False)
    prompts = prompts_of(reference, 8, 9 if small else 64)
    found = run.generate(prompts, 8 if small else 64)[0]
    single = run.generate(prompts[:1], 8 if small else 64)[0]
    run.runner.close()
    return {
        "probe_difference": slot_difference(load(device, small=small, dtype=torch.float32)),
        "agreement": agreement(reference, prompts, found, len(found[0])),
        "agreement_alone": agreement(reference, prompts[:1], single, len(found[0])),
    }


def _measure_compiled(
    device: torch.device,
    reference: LoadedModel,
    rows: list[int],
    num_prompt: int,
    num_new: int,
    report: dict[str, Any],
) -> None:
    run = EngineRun(load(device, small=False), max(rows), compile_graphs=True)
    for num_rows in rows:
        prompts = prompts_of(reference, num_rows, num_prompt)
        run.generate(prompts, num_new)  # asks for the compiled step
        started_s = time.perf_counter()
        run.wait_for_compiler()
        entry = report["rows"][num_rows]
        entry["compile_s"] = round(time.perf_counter() - started_s, 1)
        found, _, _ = run.generate(prompts, num_new)  # swaps it in
        entry["compiled"] = run.measure(prompts, num_new)
        entry["compiled_agreement"] = round(agreement(reference, prompts, found, num_new), 3)
        print(num_rows, json.dumps(entry), flush=True)
    report["num_compiled"] = run.runner.num_compiled if isinstance(run.runner, SlotRunner) else 0
    run.runner.close()


if __name__ == "__main__":
    main()
