"""Secrets are named by jobs, and text is shown without them."""

import pytest
from pydantic import ValidationError

from apt_jobs.jobs.secrets import Masker
from apt_jobs.jobs.spec import TrainSpec

TOKEN, KEY = "hf_0123456789abc", "-----BEGIN\nfirst line of it\n  second line of it\nx\n-----END"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token={TOKEN}!", "token=***!"),
        (f"{TOKEN}{TOKEN}_longer {TOKEN}", "****** ***"),
        ("a first line of it", "a ***"),
        ("a second line of it", "a ***"),
        (KEY, "***"),
        ("x is shown, it is too short", "x is shown, it is too short"),
        ("", ""),
    ],
)
def test_values_and_long_lines_of_values_are_hidden(text: str, shown: str) -> None:
    assert Masker([TOKEN, f"{TOKEN}_longer", KEY]).mask(text) == shown


def test_without_secrets_nothing_is_hidden() -> None:
    assert Masker().mask(f"{TOKEN} ***") == f"{TOKEN} ***"
    assert Masker(["(.*)+$"]).mask("aaaaaaaaaa") == "aaaaaaaaaa"


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"secrets": ["HF_TOKEN"], "entry_point": "language-model"}, "for user scripts"),
        ({"secrets": ["HF_TOKEN"], "env": {"HF_TOKEN": "x"}}, "HF_TOKEN is given twice"),
        ({"secrets": ["HF_TOKEN", "HF_TOKEN"]}, "HF_TOKEN is given twice"),
        ({"secrets": [f"A{number}" for number in range(33)]}, "at most 32 items"),
        *(({"secrets": [name]}, "may not set") for name in ("PATH", "LD_PRELOAD", "PYTHONPATH", "APT_JOBS_DATA_DIR")),
        *(({"secrets": [name]}, "secrets") for name in ("a b", "", "1A", "A=B", "../A", "A\n")),
    ],
)
def test_a_job_names_secrets_as_it_may_name_variables(job: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSpec.model_validate({"kind": "train", "entry_point": "mine", **job})
