"""What a job may ask of its Python: packages of an index, or a lock of them, and nothing that leads elsewhere."""

import pytest
from pydantic import ValidationError

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.python_environment import (
    MAX_LOCK_BYTES,
    PythonEnvironment,
    environment_hash,
    listed_packages,
    read_lock,
)
from apt_jobs.jobs.spec import TrainSpec

CODE = {"sha256": "0" * 64}


@pytest.mark.parametrize(
    "word",
    [
        *("six", "trl>=1.16,<2", "torch == 2.10.*", "peft[extra,more] ~= 0.18", " numpy "),
        "tomli>=2; python_version < '3.12' and sys_platform == \"linux\"",
    ],
)
def test_names_and_versions_are_packages(word: str) -> None:
    assert PythonEnvironment(requirements=[word]).requirements == [word.strip()]


@pytest.mark.parametrize(
    "word",
    [
        *("-e .", "--index-url https://evil.example", "-r other.txt", "-", "", "./here", "../there", "/etc/passwd"),
        *("six @ file:///etc/passwd", "git+https://a.example/b", "https://a.example/six.whl", "six.whl", "a.tar.gz"),
        *(
            "six --find-links=x",
            "six==1 -r a",
            "six>=1;--index-url=a b -c",
            "six\n--index-url=x",
            "six #egg",
            "six \\",
            "$HOME",
            "six\0",
            "x" * 301,
        ),
    ],
)
def test_options_addresses_and_paths_are_not(word: str) -> None:
    with pytest.raises(ValidationError):
        PythonEnvironment(requirements=[word])
    with pytest.raises(InvalidInput):
        read_lock(f"{word} #\n".encode(), "a.lock")


def test_a_lock_pins_every_package_with_or_without_hashes() -> None:
    text = "# by uv\nsix==1.17 \\\n    --hash=sha256:ab12 \\\n    --hash=sha256:cd34\n\npip==25 ; os_name<'4' # why\n"
    pinned = read_lock(text.encode(), "a.lock")
    assert pinned.split() == [
        "six==1.17",
        "--hash=sha256:ab12",
        "--hash=sha256:cd34",
        "pip==25",
        ";",
        "os_name<'4'",
    ]
    assert pinned.count("\n") == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"six>=1\n", "line 1 of the lock 'a.lock' does not pin a version: 'six>=1'"),
        (b"\n# nothing\n", "pins no package"),
        (b"six==1 --hash=sha256:ab --find-links=x\n", "no package of an index"),
        (b"-e git+https://a.example/b@c#egg=d\n", "line 1 .* no package of an index"),
        (b"\xff\xfe", "no text in UTF-8"),
        (b"#" * (MAX_LOCK_BYTES + 1), "at most 1,048,576 bytes"),
    ],
)
def test_what_is_no_lock_is_refused_by_its_line(content: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_lock(content, "a.lock")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "got none of them"),
        ({"name": "a", "requirements": []}, "got name and requirements"),
        ({"name": "a", "python": "3.12"}, "leave python out"),
        ({"requirements": [], "python": "3.9"}, "python"),
        ({"requirements": [], "python": "3.12; rm"}, "python"),
        ({"requirements": ["six"] * 10_000}, "at most 500 items"),
        ({"lock": "../a.lock"}, "leads out of the folder"),
        ({"lock": "/etc/passwd"}, "leads out of the folder"),
        ({"name": "../a"}, "name"),
    ],
)
def test_an_environment_says_one_thing(environment: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSpec.model_validate({"kind": "train", "code": CODE, "argv": ["python"], "environment": environment})


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"environment": {"requirements": ["six"]}}, "for user scripts"),
        ({"entry_point": "mine", "environment": {"lock": "a.lock"}}, "the job has no code"),
        ({"entry_point": "mine", "num_nodes": 2, "num_ranks": 2, "environment": {"requirements": []}}, "one machine"),
    ],
)
def test_an_environment_is_of_a_script_on_one_machine(job: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSpec.model_validate({"kind": "train", **job})


def test_packages_are_code_that_a_job_brings_and_a_registered_environment_is_not() -> None:
    built = TrainSpec.model_validate({"kind": "train", "entry_point": "mine", "environment": {"requirements": ["six"]}})
    named = TrainSpec.model_validate({"kind": "train", "entry_point": "mine", "environment": {"name": "torch-29"}})
    assert (built.brings_code, named.brings_code) == (True, False)


def test_equal_environments_have_one_name() -> None:
    one = environment_hash("3.12", "six\n", is_lock=False)
    assert one == environment_hash("3.12", "six\n", is_lock=False)
    others = {environment_hash("3.11", "six\n", is_lock=False), environment_hash("3.12", "six\n", is_lock=True)}
    assert len({one, *others, environment_hash("3.12", "six==1\n", is_lock=False)}) == 4


def test_a_file_of_requirements_is_read_without_comments() -> None:
    assert listed_packages("# of the lab\n\nsix>=1  # why\n torch\n-e .\n") == ["six>=1", "torch", "-e ."]
