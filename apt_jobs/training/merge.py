"""Write a checkpoint as one whole model, in a type of choice: `python -m apt_jobs.training.merge`.

The web process starts it for `GET /api/checkpoints/{id}/download?merged=true`, as it never loads torch itself. It adds
adapters to their base model and writes a tar file of the result to the standard output: configuration, tokenizer and
safetensors, no optimizer. Nothing is written there before all is ready; an error is one line on the standard error.
"""

import argparse
import shutil
import signal
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from apt_jobs.artifacts.folders import TEMPORARY_PREFIX, sweep
from apt_jobs.artifacts.manifest import has_manifest, require_whole
from apt_jobs.errors import AptJobsError, OutOfSpace
from apt_jobs.training.model import load_model
from apt_jobs.training.tokenizer import load_tokenizer

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEFT_BEHIND_AFTER_S = 86_400.0  # a folder of a merge that was killed


def main() -> int:
    """Merge and write.

    Returns:
        The exit status: 0, or 1 when the standard error says what is wrong.
    """
    parser = argparse.ArgumentParser(description="A checkpoint as one whole model, as a tar file.")
    parser.add_argument("--scratch", type=Path, required=True, help="Folder for the model on its way.")
    parser.add_argument("--dtype", choices=sorted(TYPES), default="float32")
    parser.add_argument("--name", required=True, help="Of the folder in the tar file.")
    parser.add_argument("folder", type=Path, help="Of the whole model.")
    parser.add_argument("adapters", type=Path, nargs="*", help="Folders of adapters, in their order.")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the folder on its way is removed
    try:
        _write(options.folder, options.adapters, TYPES[options.dtype], options.name, options.scratch)
    except (AptJobsError, OSError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


def _write(folder: Path, adapters: list[Path], dtype: torch.dtype, name: str, scratch: Path) -> None:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library's
    for source in (folder, *adapters):
        if has_manifest(source):
            require_whole(source)
    model: Any = load_model(folder, adapters).to(dtype)
    tokenizer = load_tokenizer(adapters[-1] if adapters else folder)
    scratch.mkdir(parents=True, exist_ok=True)
    sweep(scratch, older_than_s=LEFT_BEHIND_AFTER_S)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if (free := shutil.disk_usage(scratch).free) < needed:
        raise OutOfSpace(f"the merged model needs {needed:,} bytes and {free:,} are free in {scratch}")
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=scratch) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
            for path in sorted(Path(temporary).iterdir()):
                tar.add(path, f"{name}/{path.name}")


if __name__ == "__main__":
    sys.exit(main())
