"""The benchmark for GPUs runs on CPU in small form, and its engine says what `generate` says."""

from benchmarks.gpu_generate import main


def test_the_benchmark_runs_in_small_form() -> None:
    report = main(["--small", "--no-peer", "--rows", "1", "3"])
    assert report["fp32"]["agreement"] == 1.0
    assert report["fp32"]["probe_difference"] < 1e-3
    for entry in report["rows"].values():
        assert entry["agreement"] == 1.0
        assert entry["eager"]["tokens_per_s"] > 0
        assert entry["adapters"]["tokens_per_s"] > 0
