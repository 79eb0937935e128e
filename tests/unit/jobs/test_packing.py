"""What fits on a worker beside what, what never does, and when room opens: pure rules."""

from typing import Any

import pytest
from pydantic import ValidationError

from apt_jobs.jobs.needs import Needs, decode_needs, encode_needs, needs_of
from apt_jobs.jobs.packing import Gpu, Held, Offer, Room, RoomReport
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec

H100, A100, A10 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA A10"
EIGHT = tuple(Gpu(index, H100, 85.0) for index in range(8))
CPU_ONLY = Offer(cpus=2, memory_gb=8.0, max_jobs=16)
BIG = Offer(gpus=EIGHT, cpus=64, memory_gb=512.0, max_jobs=16, num_nodes=2)


def needs(**fields: Any) -> Needs:
    return decode_needs(needs_of(TrainSpec(kind="train", **fields)))


def placed(room: Room, wanted: Needs) -> Held:
    held = room.place(wanted)
    assert held is not None
    return held


def test_two_jobs_of_one_rank_share_two_cores_and_a_third_waits() -> None:
    first = placed(Room(CPU_ONLY), needs())
    second = placed(Room(CPU_ONLY, (first,)), needs())
    assert (first.cpus, second.cpus) == (1, 1)
    full = Room(CPU_ONLY, (first, second))
    assert full.is_full
    assert full.place(needs()) is None
    assert full.why_not_now(needs()) == "0 of 2 CPU cores are free, the job takes 1"


def test_a_job_that_is_alone_computes_on_all_cores_and_a_second_one_on_its_share() -> None:
    alone = placed(Room(CPU_ONLY), needs())
    assert alone.threads_per_rank == 2
    assert placed(Room(CPU_ONLY, (alone,)), needs()).threads_per_rank == 1
    assert placed(Room(CPU_ONLY), needs(num_ranks=4)).threads_per_rank == 1
    assert placed(Room(CPU_ONLY), needs(resources={"cpus": 1})).threads_per_rank == 1


def test_more_ranks_than_cores_take_all_cores() -> None:
    held = placed(Room(CPU_ONLY), needs(num_ranks=4))
    assert held.cpus == 2
    assert Room(CPU_ONLY, (held,)).place(needs()) is None


def test_jobs_on_gpus_get_gpus_of_their_own() -> None:
    first = placed(Room(BIG), needs(num_ranks=3))
    second = placed(Room(BIG, (first,)), needs(num_ranks=4))
    assert (first.gpus, second.gpus) == ((0, 1, 2), (3, 4, 5, 6))
    third = placed(Room(BIG, (first, second)), needs())
    assert third.gpus == (7,)
    assert third.threads_per_rank == 64 // 8
    taken = Room(BIG, (first, second, third))
    assert taken.place(needs()) is None
    beside = placed(taken, needs(device="cpu"))
    assert (beside.gpus, beside.cpus) == ((), 1)


def test_the_smallest_gpus_that_suit_are_taken() -> None:
    mixed = Room(Offer(gpus=(Gpu(0, H100, 85.0), Gpu(1, A10, 24.0), Gpu(2, A100, 42.0)), cpus=8, max_jobs=8))
    assert placed(mixed, needs()).gpus == (1,)
    assert placed(mixed, needs(resources={"gpu_memory_gb": 40})).gpus == (2,)
    assert placed(mixed, needs(resources={"gpu_type": "h100"})).gpus == (0,)
    assert placed(mixed, needs(resources={"gpu_type": "A10"})).gpus == (1,)  # and not the A100
    assert placed(mixed, needs(resources={"gpus": 2})).gpus == (1, 2)


@pytest.mark.parametrize(
    ("offer", "fields", "words"),
    [
        (CPU_ONLY, {"device": "cuda"}, "the job wants 1 GPUs, one for each rank, and this worker has 0 such GPUs"),
        (CPU_ONLY, {"resources": {"gpus": 1}}, "the job wants 1 GPUs, and this worker has 0"),
        (CPU_ONLY, {"resources": {"gpu_type": "H100"}}, "the job wants 1 GPUs of type H100"),
        (CPU_ONLY, {"num_ranks": 5}, "the job wants 5 ranks on CPU, where this worker allows 4"),
        (CPU_ONLY, {"resources": {"cpus": 3}}, "the job wants 3 CPU cores, and this worker has 2"),
        (CPU_ONLY, {"resources": {"memory_gb": 8.5}}, "the job wants 8.5 GB of memory, and this worker has 8"),
        (CPU_ONLY, {"num_ranks": 2, "num_nodes": 2}, "the job wants 2 nodes, and this worker has 1"),
        (BIG, {"num_ranks": 9}, "the job wants 9 GPUs, one for each rank, and this worker has 8 such GPUs"),
        (BIG, {"resources": {"gpus": 1_024}}, "the job wants 1024 GPUs, and this worker has 8 such GPUs"),
        (BIG, {"resources": {"gpu_type": "A100"}}, "GPUs of type A100, one for each rank, and this worker has 0"),
        (BIG, {"resources": {"gpu_memory_gb": 86}}, "with at least 86 GB"),
        (BIG, {"device": "cpu", "num_ranks": 5}, "the job wants 5 ranks on CPU"),
    ],
)
def test_what_a_worker_lacks_is_named(offer: Offer, fields: dict[str, Any], words: str) -> None:
    why = Room(offer).lacks(needs(**fields))
    assert why is not None
    assert words in why
    assert Room(offer).place(needs(**fields)) is None
    assert Room(offer).why_not_now(needs(**fields)) is None


def test_memory_and_the_number_of_jobs_are_limits() -> None:
    held = placed(Room(BIG), needs(resources={"memory_gb": 500}))
    assert "12 of 512 GB of memory are free" in str(Room(BIG, (held,)).why_not_now(needs(resources={"memory_gb": 20})))
    few = Room(Offer(cpus=8, max_jobs=1), (Held(cpus=1),))
    assert few.is_full
    assert few.why_not_now(needs()) == "it runs 1 of at most 1 jobs at once"


def test_one_job_at_a_time_uses_the_further_nodes() -> None:
    wanted = needs(num_ranks=2, num_nodes=2)
    held = placed(Room(BIG), wanted)
    assert Room(BIG, (held,)).place(wanted) is None
    assert placed(Room(BIG, (held,)), needs()).gpus == (1,)


def test_room_opens_when_enough_time_limits_are_over() -> None:
    def running(gpus: tuple[int, ...], ends_by_s: float | None) -> Held:
        return Held(gpus=gpus, ends_by_s=ends_by_s)

    soon, later = running((0, 1, 2, 3), 100.0), running((4, 5), 200.0)
    room = Room(BIG, (later, soon))
    assert room.place_opens_by_s(needs(num_ranks=6)) == 100.0
    assert room.place_opens_by_s(needs(num_ranks=8)) == 200.0
    endless = Room(BIG, (soon, running((4, 5), None)))
    assert endless.place_opens_by_s(needs(num_ranks=6)) == 100.0
    assert endless.place_opens_by_s(needs(num_ranks=8)) is None


@pytest.mark.parametrize(
    "resources",
    [
        {"gpus": -1},
        {"gpus": 0.5},
        {"gpus": 1_000_000_000},
        {"gpus": True},
        {"gpus": "2"},
        {"gpus": 1},  # for two ranks
        {"gpus": 2.5},
        {"gpus": 0.01},
        {"gpus": 0.999},
        {"gpus": float("nan")},
        {"gpus": float("inf")},
        {"gpus": 0, "gpu_type": "H100"},
        {"gpu_memory_gb": 0},
        {"gpu_memory_gb": float("nan")},
        {"gpu_type": ""},
        {"gpu_type": "'; DROP TABLE jobs"},
        {"gpu_type": "x" * 65},
        {"cpus": 0},
        {"cpus": 1.5},
        {"cpus": 10**9},
        {"memory_gb": -1},
        {"memory_gb": float("inf")},
        {"gpu": 2},
    ],
)
def test_resources_that_nobody_can_mean_are_refused_by_name(resources: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="resources"):
        needs(num_ranks=2, resources=resources)


@pytest.mark.parametrize(
    "fields",
    [{"device": "cpu", "resources": {"gpus": 2}}, {"device": "cuda", "resources": {"gpus": 0}}],
)
def test_a_device_and_resources_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="resources"):
        TrainSpec(kind="train", **fields)


def test_needs_survive_their_text_and_are_few() -> None:
    wanted = Needs(2, 1, "cuda", 4, "RTX 4090", 24.0, 8, 32.5, 3_600)
    assert decode_needs(encode_needs(wanted)) == wanted
    assert encode_needs(Needs()) == "{}"
    assert decode_needs("") == Needs()
    assert needs_of(GenerateSpec(kind="generate", texts=["a"])) == ""
    assert len(encode_needs(Needs(512, 64, "cuda", 1_024, "x" * 64, 9_999.999999, 4_096, 999_999.999999, 2**25))) < 300
    limits = {needs(time_limit_s=1.0 + seconds).time_limit_s for seconds in range(0, 366 * 86_400, 997)}
    assert len(limits) < 200
    assert all(
        seconds <= (needs(time_limit_s=seconds).time_limit_s or 0) <= max(60, 1.125 * seconds + 1)
        for seconds in (1.0, 59.5, 60.0, 61.0, 3_600.0, 5_000.5, 86_400.0)
    )


def test_a_report_is_read_as_it_was_written() -> None:
    jobs = (("job_a", Held((0, 1), 4, 16.0)), ("job_b", Held((), 1, 0.0, num_nodes=2)))
    report = RoomReport(cpus=8, memory_gb=64.0, max_jobs=4, max_cpu_ranks=4, num_nodes=2, jobs=jobs, kept_for="job_c")
    assert RoomReport.of_document(report.as_document()) == report
    described = [{"index": index, "name": H100, "memory_total_bytes": 85_000_000_000} for index in range(3)]
    room = report.room(described)
    assert [gpu.index for gpu in room.free_gpus] == [2]
    assert (room.free_cpus, room.free_memory_gb) == (3, 48.0)


PART = {"resources": {"gpus": 0.5}}


def test_jobs_share_a_gpu_by_parts_and_whole_ones_keep_theirs() -> None:
    two = Offer(gpus=(Gpu(0, H100, 80.0), Gpu(1, H100, 80.0)), cpus=8, max_jobs=16)
    held: list[Held] = []
    for wanted in (PART, {"num_ranks": 1}, PART):
        held.append(placed(Room(two, tuple(held)), needs(**wanted)))
    assert [(one.gpus, one.gpu_share) for one in held] == [((0,), 0.5), ((1,), 1.0), ((0,), 0.5)]
    full = Room(two, tuple(held))
    assert full.place(needs(resources={"gpus": 0.05})) is None
    assert full.why_not_now(needs(resources={"gpus": 0.05})) == "no GPU that suits has 0.05 of it free"
    assert Room(two, (held[0],)).free_gpus == (two.gpus[1],)
    assert Room(two, (held[0], held[1])).why_not_now(needs()) == "0 of 2 GPUs are free and suit, the job takes 1"


def test_tenths_add_up_to_a_whole_gpu() -> None:
    one, held = Offer(gpus=(Gpu(0, H100, 80.0),), max_jobs=16), tuple[Held, ...]()
    for _ in range(10):
        held = (*held, placed(Room(one, held), needs(resources={"gpus": 0.1})))
    assert Room(one, held).place(needs(resources={"gpus": 0.1})) is None
    assert Room(one, (*held, Held(cpus=1))).is_full


def test_the_memory_that_a_job_asks_for_is_that_of_its_part() -> None:
    one = Room(Offer(gpus=(Gpu(0, H100, 80.0),), max_jobs=16))
    assert one.place(needs(resources={"gpus": 0.5, "gpu_memory_gb": 40})) is not None
    why = one.lacks(needs(resources={"gpus": 0.5, "gpu_memory_gb": 41}))
    assert why == "the job wants 0.5 of a GPU with at least 41 GB, and this worker has 0 such GPUs"


@pytest.mark.parametrize("fields", [{"num_ranks": 2}, {"num_ranks": 2, "num_nodes": 2}, {"device": "cpu"}])
def test_a_part_of_a_gpu_is_for_one_rank(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="resources"):
        TrainSpec.model_validate({"kind": "train", **PART, **fields})


def test_whole_numbers_stay_whole_however_they_are_written() -> None:
    assert needs(resources={"gpus": 2.0}) == needs(resources={"gpus": 2})
    assert encode_needs(needs(resources={"gpus": 2.0})) == '{"gpus":2}'
    assert TrainSpec.model_validate({"kind": "train", **PART}).model_dump(mode="json")["resources"]["gpus"] == 0.5


def test_a_report_tells_shares_and_the_memory_that_jobs_may_use() -> None:
    report = RoomReport(8, 64.0, 4, 4, 1, (("job_a", Held((0,), gpu_share=0.25)),))
    assert RoomReport.of_document(report.as_document()) == report
    described = [{"index": 0, "name": H100, "memory_total_bytes": 80e9, "memory_fraction": 0.75}]
    room = report.room(described)
    assert (room.free_share(room.offer.gpus[0]), room.offer.gpus[0].memory_gb) == (0.75, 60.0)
