"""What of the operator's shell a training sees: what it needs, and no secret."""

import pytest

from apt_jobs.supervision.rank_environment import passed_environment


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "CUDA_HOME", "NCCL_DEBUG", "OMP_NUM_THREADS", "HF_HOME"),
        *("https_proxy", "HTTPS_PROXY", "no_proxy", "PYTHONPATH", "TORCH_LOGS", "LD_LIBRARY_PATH"),
    ],
)
def test_what_a_training_needs_passes(name: str) -> None:
    assert passed_environment({name: "value"}) == {name: "value"}


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "SSH_AUTH_SOCK", "PGPASSWORD"),
        *("APT_JOBS_DATABASE_URL", "APT_JOBS_API_KEY", "GITHUB_TOKEN", "OPENAI_API_KEY", "ANYTHING", "CUDA_TOKEN"),
    ],
)
def test_a_secret_does_not_pass_unless_the_operator_names_it(name: str) -> None:
    assert passed_environment({name: "secret"}) == {}
    assert passed_environment({name: "secret"}, [name]) == {name: "secret"}
