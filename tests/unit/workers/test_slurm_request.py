"""What is asked of Slurm, and what is read from its answers."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from apt_jobs.errors import WorkerLacks
from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Gpu, Offer
from apt_jobs.workers.slurm.attempt import waiting_words
from apt_jobs.workers.slurm.client import command_environment, in_words, read_job_id, read_row
from apt_jobs.workers.slurm.offer import offer_of, why_closed
from apt_jobs.workers.slurm.request import Attempt, attempt_of_name, sbatch_arguments, script_of
from apt_jobs.workers.slurm.step import begin, gpus_of_allocation, step_environment

ATTEMPT = Attempt("job_1-x", 3, "slurm", Path("/shared/50%/attempt-3"))
MIXED = Offer(gpus=(Gpu(0, "a100", 80.0), Gpu(1, "h100", 80.0), Gpu(2, "h100", 80.0)), cpus=64, memory_gb=512.0)


def arguments(needs: Needs, offer: Offer = MIXED, options: tuple[str, ...] = ()) -> list[str]:
    return sbatch_arguments(ATTEMPT, needs, offer, partition="gpu", save_s=120.0, options=options)


@pytest.mark.parametrize(
    ("needs", "offer", "asked", "not_asked"),
    [
        (Needs(num_ranks=2), MIXED, ["--gres=gpu:2", "--cpus-per-task=2"], ["--mem", "--time"]),
        (Needs(num_ranks=2), Offer(cpus=4), ["--cpus-per-task=2"], ["--gres"]),
        (Needs(device="cpu", cpus=8), MIXED, ["--cpus-per-task=8"], ["--gres"]),
        (Needs(gpus=0), MIXED, [], ["--gres"]),
        (Needs(gpus=0.5), MIXED, ["--gres=gpu:1"], []),
        (Needs(gpus=2, gpu_type="H100"), MIXED, ["--gres=gpu:h100:2"], []),
        (Needs(gpus=1, gpu_memory_gb=40.0), MIXED, ["--gres=gpu:a100:1"], []),
        (Needs(gpus=1, gpu_memory_gb=40.0), Offer(gpus=(Gpu(0, "gpu", 80.0),)), ["--gres=gpu:1"], []),
        (Needs(memory_gb=1.0, time_limit_s=60), MIXED, ["--mem=954M", "--time=4"], []),
    ],
)
def test_resources_become_options_of_sbatch(needs: Needs, offer: Offer, asked: list[str], not_asked: list[str]) -> None:
    found = arguments(needs, offer)
    assert set(asked) <= set(found)
    assert [option for option in found for name in not_asked if option.startswith(name)] == []


def test_a_submission_has_the_attempts_name_and_is_not_requeued() -> None:
    found = arguments(Needs(), options=("--partition=other",))
    assert {"--job-name=apt-job_1-x-3", "--no-requeue", "--comment=apt_jobs worker slurm"} <= set(found)
    assert "--output=/shared/50%%/attempt-3/slurm.log" in found  # Slurm replaces %j and the like
    assert found.index("--partition=gpu") < found.index("--partition=other")
    assert attempt_of_name("apt-job_1-x-3") == ("job_1-x", 3)
    assert [attempt_of_name(name) for name in ("apt-x", "other-1", "apt--1", "apt-x-", "", "apt-x-1|")] == [None] * 6


def test_a_script_quotes_what_it_is_given() -> None:
    odd = Attempt("job_1", 1, "slurm; rm -rf $HOME", Path("/a b/attempt-1"))
    assert "'--worker-name=slurm; rm -rf $HOME'" in script_of(odd, Needs())
    assert "'--folder=/a b/attempt-1'" in script_of(odd, Needs())


@pytest.mark.parametrize(
    ("rows", "gpus", "cpus", "memory_gb", "num_nodes"),
    [
        (["2|64|512000|gpu:a100:4(S:0-1)|up", "1|128+|1024000+|gpu:a100:8|up"], {"a100": 8}, 128, 1073.7, 3),
        (["2|8|2000|(null)|up"], {}, 8, 2.1, 2),
        (["1|8|2000|gpu:2|up"], {"gpu": 2}, 8, 2.1, 1),
        (["1|8|2000|gpu:a100:1,gpu:h100:2,shard:8|up"], {"a100": 1, "h100": 2}, 8, 2.1, 1),
    ],
)
def test_a_partition_offers_the_largest_of_its_nodes(
    rows: list[str], gpus: dict[str, int], cpus: int, memory_gb: float, num_nodes: int
) -> None:
    offer = offer_of(rows, max_jobs=4, gpu_memory_gb=0.0)
    assert offer is not None
    assert offer.num_nodes == num_nodes
    names = [gpu.name for gpu in offer.gpus]
    assert {name: names.count(name) for name in names} == gpus
    assert (offer.cpus, offer.memory_gb, offer.max_jobs) == (cpus, memory_gb, 4)


@pytest.mark.parametrize("rows", [[], ["0|0|0|(null)|up"], ["garbage"], ["|||||||"]])
def test_a_partition_that_is_gone_offers_nothing(rows: list[str]) -> None:
    assert offer_of(rows, max_jobs=4, gpu_memory_gb=0.0) is None


def test_a_partition_that_is_down_is_closed() -> None:
    assert why_closed(["2|64|512000|(null)|drain"]) == "the partition of Slurm is drain: it takes no jobs"
    assert why_closed(["2|64|512000|(null)|up"]) is None


def test_answers_of_slurm_are_read() -> None:
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    row = read_row(f"4711|PENDING|{soon.timestamp():.0f}|n[0-1]|apt-job_1-1|apt_jobs worker slurm|ReqNodeNotAvail, a|b")
    assert row is not None
    assert (row.id, row.is_pending, row.is_over, row.reason) == ("4711", True, False, "ReqNodeNotAvail, a|b")
    assert row.start_at == soon
    assert waiting_words([row]) == (
        "starting: pending in Slurm as job 4711, reason: ReqNodeNotAvail, a|b; expected to start at about "
        f"{soon.strftime('%Y-%m-%d %H:%M UTC')}"
    )
    assert "expected" not in waiting_words(
        [replace(row, start_at=soon + timedelta(days=365))]
    )  # behind one without end
    unknown = read_row("4711|RUNNING|N/A||name|(null)|None")
    assert unknown is not None
    assert unknown.start_at is None
    assert read_row("slurm_load_jobs error: Unable to contact slurm controller") is None
    assert [read_job_id(text) for text in ("12", "12;cluster\n", "warning\n7\n8", "", "Submitted 5")] == [
        "12",
        "12",
        "7",
        None,
        None,
    ]
    assert in_words("") == "it said nothing"
    assert len(in_words("x" * 10_000)) < 600


def test_slurm_gets_no_setting_and_the_step_nothing_of_slurm(tmp_path: Path) -> None:
    own = {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/opt/slurm/lib:/opt/cuda/lib",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_JOB_ID": "1",  # of an allocation that the worker runs in
        "SBATCH_PARTITION": "x",
        "APT_JOBS_DATABASE_URL": "postgresql://user:password@db/x",
    }
    assert command_environment(own) == {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/opt/slurm/lib:/opt/cuda/lib",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_TIME_FORMAT": "%s",
    }
    assert step_environment(own, tmp_path) == {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/opt/cuda/lib",
        "APT_JOBS_DATABASE_URL": own["APT_JOBS_DATABASE_URL"],
        "APT_JOBS_DATA_DIR": str(tmp_path),
    }


def test_the_first_allocation_of_an_attempt_works_alone(tmp_path: Path) -> None:
    assert [begin(tmp_path), begin(tmp_path)] == [True, False]


def test_gpus_of_an_allocation_are_indexes() -> None:
    assert gpus_of_allocation({"CUDA_VISIBLE_DEVICES": "2,3"}) == [2, 3]
    assert gpus_of_allocation({"CUDA_VISIBLE_DEVICES": ""}) == gpus_of_allocation({}) == []
    with pytest.raises(WorkerLacks, match="GPU-5ebe9ca2"):
        gpus_of_allocation({"CUDA_VISIBLE_DEVICES": "GPU-5ebe9ca2"})
