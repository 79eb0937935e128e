"""Sampling against distributions computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from apt_jobs.generation.sampling import choose_tokens, draw, nucleus, row_generator

PROBABILITIES = [0.15, 0.5, 0.05, 0.3]  # of tokens 0 to 3


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor([[math.log(value) for value in row] for row in rows])


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_token(probabilities_BV: Tensor, tokens_BV: Tensor) -> list[float]:
    """Row 0 in the order of the vocabulary."""
    return torch.zeros_like(probabilities_BV[0]).scatter(0, tokens_BV[0], probabilities_BV[0]).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, PROBABILITIES),
        (1.0, 0.8, [0.0, 0.625, 0.0, 0.375]),  # 0.5 is short of 0.8, 0.5 + 0.3 reaches it
        (1.0, 0.81, [0.15 / 0.95, 0.5 / 0.95, 0.0, 0.3 / 0.95]),
        (1.0, 0.5, [0.0, 1.0, 0.0, 0.0]),
        (1.0, 1e-9, [0.0, 1.0, 0.0, 0.0]),
        (0.5, 1.0, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),  # squares, normalised
        (1e-300, 1.0, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_the_distribution_is_the_one_computed_by_hand(temperature: float, top_p: float, expected: list[float]) -> None:
    probabilities_BV, tokens_BV = nucleus(logits(PROBABILITIES), floats(temperature), floats(top_p))
    assert by_token(probabilities_BV, tokens_BV) == pytest.approx(expected, abs=1e-6)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    num_draws = 2_000
    chosen_B = choose_tokens(
        logits(PROBABILITIES).expand(num_draws, -1),
        floats(1.0).expand(num_draws),
        floats(1.0).expand(num_draws),
        (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws,
    )
    assert (chosen_B.bincount(minlength=4) / num_draws).tolist() == pytest.approx(PROBABILITIES, abs=1e-3)


@pytest.mark.parametrize("drawn", [0.0, 0.999999999999, 1.0])
def test_a_draw_at_the_edge_never_leaves_the_nucleus(drawn: float) -> None:
    chosen_B = choose_tokens(logits(PROBABILITIES), floats(1.0), floats(0.8), floats(drawn))
    assert chosen_B.tolist() == [1 if drawn == 0.0 else 3]


def test_a_banned_token_is_never_chosen() -> None:
    logits_BV = torch.tensor([[-math.inf, 0.0, -math.inf]])
    for drawn in (0.0, 0.5, 1.0):
        assert choose_tokens(logits_BV, floats(5.0), floats(1.0), floats(drawn)).tolist() == [1]


def test_temperature_zero_takes_the_likeliest_token_whatever_the_draw() -> None:
    chosen_B = choose_tokens(logits(PROBABILITIES), floats(0.0), floats(0.1), floats(0.99))
    assert chosen_B.tolist() == [1]


def test_a_rows_token_does_not_depend_on_the_other_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.randn(8, 50, generator=generator)
    temperature_B, top_p_B = floats(*[0, 1, 0.7, 2, 0, 1, 5, 0.1]), floats(*[1, 0.9, 0.5, 1, 1, 0.3, 1, 0.8])
    draws_B = torch.rand(8, generator=generator, dtype=torch.float64)
    together = choose_tokens(logits_BV, temperature_B, top_p_B, draws_B).tolist()
    alone = [
        choose_tokens(logits_BV[[row]], temperature_B[[row]], top_p_B[[row]], draws_B[[row]]).item() for row in range(8)
    ]
    assert together == alone


def test_a_seed_gives_the_same_draws_and_none_gives_others() -> None:
    draws = [[draw(generator) for _ in range(5)] for generator in map(row_generator, [7, 7, 8, None, None])]
    assert draws[0] == draws[1]
    assert len({tuple(row) for row in draws}) == 4
    assert all(0 <= value < 1 for row in draws for value in row)
