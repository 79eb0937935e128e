"""Counting takes a small part of one core however often a page asks, and is done once for all who ask at a time."""

import threading
import time

import pytest

from apt_jobs.web.count_cache import COST_SHARE, MAX_KEPT, MAX_KEPT_S, CountCache


class Clock:
    """`time.monotonic` by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


@pytest.mark.parametrize(("cost_s", "kept_s"), [(0.1, 0.1 / COST_SHARE), (1e6, MAX_KEPT_S)])
def test_a_count_is_kept_for_a_multiple_of_what_it_took(
    monkeypatch: pytest.MonkeyPatch, cost_s: float, kept_s: float
) -> None:
    clock, counts, calls = Clock(monkeypatch), CountCache(), []

    def count() -> dict[str, int]:
        clock.now_s += cost_s
        calls.append(clock.now_s)
        return {"queued": len(calls)}

    assert counts.get("all", count) == {"queued": 1}
    clock.now_s += kept_s * 0.9
    assert counts.get("all", count) == {"queued": 1}
    assert counts.get("others", count) == {"queued": 2}
    clock.now_s += kept_s
    assert counts.get("all", count) == {"queued": 3}


def test_what_counts_at_no_cost_is_never_old(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    counts, calls = CountCache(), iter(range(10))
    assert [counts.get("all", lambda: {"queued": next(calls)})["queued"] for _ in range(3)] == [0, 1, 2]


def test_a_count_that_fails_keeps_nobody_from_the_next_one() -> None:
    counts = CountCache()
    with pytest.raises(ZeroDivisionError):
        counts.get("all", lambda: {"queued": 1 // 0})
    assert counts.get("all", lambda: {"queued": 1}) == {"queued": 1}


def test_one_counts_for_all_who_ask_at_the_same_time() -> None:
    counts, begun, go_on, calls = CountCache(), threading.Event(), threading.Event(), []

    def count() -> dict[str, int]:
        calls.append(1)
        begun.set()
        assert go_on.wait(30)
        time.sleep(0.05)  # what it costs, so that it is kept
        return {"queued": 7}

    found: list[dict[str, int]] = []
    threads = [threading.Thread(target=lambda: found.append(counts.get("all", count))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert (found, len(calls)) == ([{"queued": 7}] * 4, 1)


def test_few_questions_are_kept() -> None:
    counts = CountCache()

    def count() -> dict[str, int]:
        time.sleep(0.0001)
        return {"queued": 1}

    for number in range(2 * MAX_KEPT):
        counts.get(number, count)
    assert len(counts._kept) == MAX_KEPT
    assert counts._counting == {}
