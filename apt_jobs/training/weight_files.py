"""Which files hold a model's weights: safetensors beside its config, and nothing else.

transformers opens whatever file a folder's index names, a pickle too, also when it is told to use safetensors.
"""

import json
from pathlib import Path

from apt_jobs.errors import InvalidCheckpoint

INDEX = "model.safetensors.index.json"


def require_safetensors(folder: Path) -> None:
    """Return if the weights are one safetensors file, or several that an index names.

    Raises:
        InvalidCheckpoint: they are not.
    """
    if (folder / "model.safetensors").is_file():
        return
    try:
        named = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        raise InvalidCheckpoint(
            f"model {folder.name!r} lacks model.safetensors (pickled weights are not read)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise InvalidCheckpoint(f"{INDEX} of model {folder.name!r} cannot be read: {exc!r}") from exc
    there = {path.name for path in folder.glob("*.safetensors")}
    if wrong := sorted(map(repr, named - there)):
        raise InvalidCheckpoint(
            f"{INDEX} of model {folder.name!r} names {wrong[0]}, which is no safetensors file in its folder"
        )
