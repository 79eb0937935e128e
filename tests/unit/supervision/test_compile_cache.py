"""The cache of compiled kernels keeps to its limit: what was not used for longest goes, a folder at a time."""

import os
import time
from pathlib import Path

from apt_jobs.settings import Settings
from apt_jobs.supervision.compile_cache import IN_USE_S, compile_cache_dir, prune_compile_cache


def kernel(settings: Settings, name: str, age_s: float) -> Path:
    folder = compile_cache_dir(settings) / "triton" / "0" / name
    folder.mkdir(parents=True)
    for file in ("kernel.cubin", "kernel.json"):
        (folder / file).write_bytes(bytes(500))
        then = time.time() - age_s
        os.utime(folder / file, (then, then))
    return folder


def test_the_oldest_kernels_go_whole_until_the_limit_is_kept(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, compile_cache_max_bytes=2_000)
    kernels = [kernel(settings, f"k{age}", age * 10 * IN_USE_S) for age in (1, 2, 3, 4)]
    assert prune_compile_cache(settings) == 2_000
    assert [folder.exists() for folder in kernels] == [True, True, False, False]
    assert prune_compile_cache(settings) == 0


def test_what_is_in_use_stays_whatever_the_limit(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, compile_cache_max_bytes=0)
    assert prune_compile_cache(settings) == 0  # there is none yet
    young, old = kernel(settings, "young", 1.0), kernel(settings, "old", 10 * IN_USE_S)
    assert prune_compile_cache(settings) == 1_000
    assert (young.exists(), old.exists()) == (True, False)
