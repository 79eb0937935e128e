"""Sampling against distributions computed by hand, by both ways of finding the candidates."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_jobs.generation import sampler
from apt_jobs.generation.sampler import NOT_FINITE, PenaltyRows, SamplingRows, choose, draw, penalized, row_seed

PROBABILITIES = [0.15, 0.5, 0.05, 0.3]  # of tokens 0 to 3
NUM_DRAWS = 20_000

Ways = Callable[[Tensor, Tensor, SamplingRows], Tensor]


def logits(probabilities: list[float]) -> Tensor:
    return torch.tensor([[math.log(value) for value in probabilities]])


def rows(num_rows: int, **fields: float) -> SamplingRows:
    values: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, **fields}
    return SamplingRows(
        temperature_B=torch.full((num_rows,), values["temperature"]),
        top_k_B=torch.full((num_rows,), values["top_k"], dtype=torch.long),
        top_p_B=torch.full((num_rows,), values["top_p"]),
        min_p_B=torch.full((num_rows,), values["min_p"]),
        seed_B=torch.full((num_rows,), row_seed(values["seed"], 0), dtype=torch.long),
    )


def frequencies(probabilities: list[float], **fields: float) -> list[float]:
    """Of each token, over many positions."""
    chosen_B = choose(logits(probabilities).expand(NUM_DRAWS, -1), torch.arange(NUM_DRAWS), rows(NUM_DRAWS, **fields))
    counted: list[float] = (chosen_B.bincount(minlength=len(probabilities)) / NUM_DRAWS).tolist()
    return counted


@pytest.fixture(params=["candidates", "few candidates", "sorting"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CPU, with a nucleus wider than the candidates, and as in a CUDA graph."""
    if request.param == "few candidates":
        monkeypatch.setattr(sampler, "MAX_CANDIDATES", 1)
    if request.param == "sorting":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_p": 0.79}, [0.0, 0.625, 0.0, 0.375]),  # 0.5 is short of it, 0.5 + 0.3 reaches it
        ({"top_p": 0.81}, [0.15 / 0.95, 0.5 / 0.95, 0.0, 0.3 / 0.95]),
        ({"top_p": 0.499}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 1e-9}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 2}, [0.0, 0.625, 0.0, 0.375]),
        ({"top_k": 1}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_k": 2, "top_p": 0.6}, [0.0, 1.0, 0.0, 0.0]),  # of the two, the first has 0.625
        ({"min_p": 0.59}, [0.0, 0.625, 0.0, 0.375]),
        ({"min_p": 0.2, "top_p": 0.79}, [0.0, 0.625, 0.0, 0.375]),
        ({"min_p": 1.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 0.5}, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),  # squares, normalised
        ({"temperature": 1e-30}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 0.0}, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_tokens_come_as_often_as_computed_by_hand(fields: dict[str, float], expected: list[float]) -> None:
    found = frequencies(PROBABILITIES, **fields)
    assert found == pytest.approx(expected, abs=0.012)
    assert [value > 0 for value in found] == [value > 0 for value in expected]


@pytest.mark.usefixtures("_way")
def test_a_banned_token_is_never_chosen() -> None:
    logits_BV = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(1_000, -1)
    assert set(choose(logits_BV, torch.arange(1_000), rows(1_000, temperature=5.0)).tolist()) == {1}


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_says_so_and_spoils_no_other(bad: float) -> None:
    logits_BV = logits(PROBABILITIES).repeat(3, 1)
    logits_BV[1, 2] = bad
    assert choose(logits_BV, torch.zeros(3, dtype=torch.long)).tolist() == [1, NOT_FINITE, 1]
    sampled = choose(logits_BV, torch.arange(3), rows(3)).tolist()
    assert (sampled[1], min(sampled[0], sampled[2])) == (NOT_FINITE, min(sampled[0], sampled[2]))
    assert min(sampled[0], sampled[2]) >= 0


def test_draws_are_uniform_and_depend_on_seed_sequence_and_position() -> None:
    seeds_B = torch.full((NUM_DRAWS,), row_seed(7, 0), dtype=torch.long)
    draws_B = draw(seeds_B, torch.arange(NUM_DRAWS))
    assert float(draws_B.min()) >= 0.0
    assert float(draws_B.max()) < 1.0
    assert (draws_B * 10).long().bincount(minlength=10).tolist() == pytest.approx([NUM_DRAWS / 10] * 10, rel=0.1)
    assert torch.equal(draw(seeds_B[:5], torch.arange(5)), draws_B[:5])
    others = [row_seed(seed, sequence) for seed in (0, 7, 8, 2**63 - 1) for sequence in (0, 1)]
    assert len({float(draw(torch.tensor([other]), torch.tensor([3]))) for other in others}) == len(others)


def test_penalties_are_those_computed_by_hand() -> None:
    penalties = PenaltyRows(
        repetition_B=torch.tensor([2.0]),
        presence_B=torch.tensor([0.5]),
        frequency_B=torch.tensor([0.25]),
        in_prompt_BV=torch.tensor([[True, False, False, False]]),
        num_in_output_BV=torch.tensor([[0, 3, 0, 1]], dtype=torch.int32),
        bias_BV=torch.tensor([[0.0, 0.0, -4.0, 0.0]]),
    )
    lowered = penalized(torch.tensor([[4.0, -1.0, 3.0, 2.0]]), penalties).tolist()[0]
    assert lowered == pytest.approx([2.0, -2.0 - 0.75 - 0.5, -1.0, 1.0 - 0.25 - 0.5])
