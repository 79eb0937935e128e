"""Which arguments and environment variables a job may give its processes."""

from typing import Annotated

from pydantic import AfterValidator, StringConstraints

MIRROR_VARIABLE = "APT_JOBS_MIRROR"  # whose scalars become metrics: see `run/mirror.py`
GPU_MEMORY_VARIABLE = "APT_JOBS_GPU_MEMORY_FRACTION"  # of each visible GPU that the job's process may use: "0.5"
RESERVED_PREFIXES = ("APT_JOBS_", "LD_", "DYLD_", "PYTHON", "TORCHELASTIC_", "TORCHINDUCTOR_", "TRITON_", "GIT_")
RESERVED_VARIABLES = frozenset(
    (
        # They decide which code runs.
        *("PATH", "HOME", "SHELL", "BASH_ENV", "ENV", "IFS", "PS4", "PROMPT_COMMAND", "GCONV_PATH"),
        *("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "OMP_TOOL_LIBRARIES", "TORCH_EXTENSIONS_DIR"),
        *("HF_MODULES_CACHE", "NODE_OPTIONS", "PERL5LIB"),
        # The worker sets them.
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
        *("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"),
        *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    )
)


def _require_no_nul(text: str) -> str:
    """Refuse what no process can be started with."""
    if "\0" in text:
        raise ValueError("a NUL character cannot be passed to a process; leave it out")
    return text


def _require_free_variable(name: str) -> str:
    """Refuse environment variables that decide which code runs, or which the service sets."""
    if name == MIRROR_VARIABLE:
        return name
    if name in RESERVED_VARIABLES or name.startswith(RESERVED_PREFIXES) or name.endswith("_PLUGIN"):
        raise ValueError(f"a job may not set {name}: the worker sets it, or it decides which code runs")
    return name


def as_flag(name: str, value: bool | int | float | str) -> str:
    """Return one of a job's `arguments` as scripts read it: `true` is the bare flag, anything else its value."""
    if value is True:
        return f"--{name}"
    return f"--{name}={'false' if value is False else value}"


Argument = Annotated[str, StringConstraints(max_length=4_000), AfterValidator(_require_no_nul)]
VariableName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$"), AfterValidator(_require_free_variable)
]
