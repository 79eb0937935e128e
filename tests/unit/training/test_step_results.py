"""How long a step took is known from when it was done, not from when the host read it."""

import time

import torch

from apt_jobs.training.step_results import StepResults


def test_two_steps_that_are_read_at_once_on_a_cpu_were_done_one_after_the_other() -> None:
    results = StepResults(torch.device("cpu"))
    began: list[float] = []
    for step in (1, 2):
        began.append(time.perf_counter())
        results.send(step, 0.1, began[-1], torch.tensor([1.0, 0.0, 0.0, 1.0]))
        results.note_queued()
    read_s = time.perf_counter()
    first, second = results.receive(num_left=0)
    assert began[0] <= first.done_s <= began[1] <= second.done_s <= read_s
