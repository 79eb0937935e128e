"""Loaded by the Python of a job with APT_JOBS_MIRROR before its script; the machine's own `sitecustomize` as well."""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _load_next() -> None:
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_load_next()
try:
    from apt_jobs.run.mirror import install
except ImportError:
    pass  # a Python that does not have this package
else:
    install(os.environ.get("APT_JOBS_MIRROR", ""))
