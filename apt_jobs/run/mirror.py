"""Scalars that an unchanged script writes for TensorBoard or Weights & Biases, as metrics of its job.

`APT_JOBS_MIRROR=tensorboard,wandb` names them. Python itself loads `mirror_site/sitecustomize.py`, which calls
`install`. When the script, or a trainer that it uses, imports a writer, the writer's methods are wrapped: it writes as
ever, and the run logs the same numbers.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from apt_jobs.run.current import current_run
from apt_jobs.run.metric_values import plain_number

MIRRORS = {  # the modules that write
    "tensorboard": ("torch.utils.tensorboard.writer", "tensorboardX.writer"),
    "wandb": ("wandb.sdk.wandb_run",),
}
MAX_DEPTH = 10  # of dicts within dicts; wandb's own limit is that of its server


def install(names: str) -> None:
    """Mirror what is named, as `tensorboard`, once its module is imported. What is not known is noted in the log."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    modules = {module for name in wanted for module in MIRRORS.get(name, ())}
    if unknown := [name for name in wanted if name not in MIRRORS]:
        current_run().log_text(f"APT_JOBS_MIRROR names {', '.join(unknown)}; it knows {', '.join(MIRRORS)}", "warning")
    if "wandb" in wanted and not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")  # without a key `wandb.init` asks for one, and nobody answers
    if modules:
        sys.meta_path.insert(0, _Finder(modules))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules as the other finders do, and wraps them once they are loaded."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec with a loader that wraps; None: the module is none of ours."""
        if fullname not in self._names:
            return None
        self._names.discard(fullname)  # the others are asked now
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if writer := getattr(module, "SummaryWriter", None):
            writer.add_scalar = _wrapped(writer.add_scalar, _log_scalar)
            writer.add_scalars = _wrapped(writer.add_scalars, _log_scalars)
        elif run := getattr(module, "Run", None):
            run.log = _wrapped_log(run.log)


def _wrapped(method: Callable[..., Any], log: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def both(writer: Any, *args: Any, **kwargs: Any) -> Any:
        answer = method(writer, *args, **kwargs)
        log(*args, **kwargs)
        return answer

    return both


def _log_scalar(tag: str, scalar_value: Any, global_step: Any = None, *_: Any, **__: Any) -> None:
    current_run().log({tag: scalar_value}, step=global_step)


def _log_scalars(
    main_tag: str, tag_scalar_dict: Mapping[str, Any], global_step: Any = None, *_: Any, **__: Any
) -> None:
    current_run().log({f"{main_tag}/{tag}": value for tag, value in tag_scalar_dict.items()}, step=global_step)


def _wrapped_log(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `log` of a run of wandb, whose step goes on by itself where none is given."""

    @functools.wraps(method)
    def both(
        run: Any, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None, **options: Any
    ) -> Any:
        own_step = run.step if step is None else step
        answer = method(run, data, step, commit, **options)
        if values := _flattened(data):
            current_run().log(values, step=own_step)
        return answer

    return both


def _flattened(data: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Return the numbers alone; those of inner dicts are named `outer.inner`, as wandb shows them."""
    numbers: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            numbers |= _flattened(value, f"{prefix}{name}.", depth + 1)
        elif plain_number(value) is not None:
            numbers[f"{prefix}{name}"] = value
    return numbers
