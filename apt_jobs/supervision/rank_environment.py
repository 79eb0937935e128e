"""What the ranks see of the worker's environment: names that a training needs, and nothing else.

An operator's shell holds tokens and passwords, and a user's script reads its whole environment. What further variables
pass, `APT_JOBS_PASS_ENVIRONMENT` says; a job sets its own by `env`.
docs/how-to/user_scripts.md has the list.
"""

from collections.abc import Iterable, Mapping

PASSED_NAMES = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM", "TMPDIR", "TMP", "TEMP"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "LIBRARY_PATH", "CPATH", "CC", "CXX", "VIRTUAL_ENV", "CONDA_PREFIX"),
        *("PYTHONPATH", "PYTHONHASHSEED", "PYTHONNOUSERSITE", "PYTHONUTF8", "PYTHONWARNINGS", "PYTHONFAULTHANDLER"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),  # and in small letters
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "XDG_CACHE_HOME"),
        *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT"),
        *("TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"),
        *("CUBLAS_WORKSPACE_CONFIG", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "MALLOC_ARENA_MAX", "NUMEXPR_NUM_THREADS"),
    )
)
PASSED_PREFIXES = (
    *("LC_", "CUDA_", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "OMPI_", "SLURM_"),
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "ROCM_", "HIP_", "HSA_", "RCCL_", "MIOPEN_"),
    *("TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_"),
)
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "CREDENTIAL")


def passed_environment(environment: Mapping[str, str], further_names: Iterable[str] = ()) -> dict[str, str]:
    """Return the variables that pass, of the worker's `environment`."""
    further = frozenset(further_names)
    return {name: value for name, value in environment.items() if name in further or _is_passed(name)}


def _is_passed(name: str) -> bool:
    if any(word in name.upper() for word in _SECRET_WORDS):
        return False
    return name in PASSED_NAMES or name.upper() in PASSED_NAMES or name.startswith(PASSED_PREFIXES)
