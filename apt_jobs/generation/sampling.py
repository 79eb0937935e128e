"""From a model's logits to the next token of each row: greedy, temperature, nucleus. Pure functions.

Every row brings its own uniform draw, so its token does not depend on what else is in the batch.
Shapes: B rows, V entries of the vocabulary.
"""

import secrets

import torch
from torch import Tensor

SEED_BITS = 63


def row_generator(seed: int | None) -> torch.Generator:
    """The source of one row's draws, on the CPU whatever the model runs on. None: a fresh seed."""
    generator = torch.Generator()
    generator.manual_seed(secrets.randbits(SEED_BITS) if seed is None else seed)
    return generator


def draw(generator: torch.Generator) -> float:
    """The next uniform number in [0, 1) of a row."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def nucleus(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities in falling order and the tokens they belong to, both (B, V), float64 and int64.

    The nucleus is the least set of the likeliest tokens whose mass reaches `top_p` (Holtzman et al. 2020, section 3.1);
    all others have probability 0. Temperatures are positive.
    """
    sorted_BV, tokens_BV = torch.sort(logits_BV.double(), dim=-1, descending=True, stable=True)
    # relative to the maximum: no temperature, however small, makes it overflow
    scaled_BV = (sorted_BV - sorted_BV[:, :1]) / temperature_B.double()[:, None]
    probabilities_BV = torch.softmax(scaled_BV, dim=-1)
    mass_before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    outside_BV = mass_before_BV >= top_p_B.double()[:, None]
    outside_BV[:, 0] = False
    probabilities_BV = probabilities_BV.masked_fill(outside_BV, 0.0)
    return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True), tokens_BV


def choose_tokens(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, draws_B: Tensor) -> Tensor:
    """The next token of each row, (B,) int64: the likeliest at temperature 0, else the one that the draw falls on."""
    chosen_B = logits_BV.argmax(dim=-1)
    sampled_B = temperature_B > 0
    if not bool(sampled_B.any()):
        return chosen_B
    probabilities_BV, tokens_BV = nucleus(logits_BV[sampled_B], temperature_B[sampled_B], top_p_B[sampled_B])
    edges_BV = probabilities_BV.cumsum(dim=-1)
    draws_B1 = draws_B[sampled_B].double()[:, None] * edges_BV[:, -1:]  # the sum may differ from 1 by rounding
    places_B1 = torch.searchsorted(edges_BV, draws_B1, right=True)
    last_B1 = (probabilities_BV > 0).sum(dim=-1, keepdim=True) - 1
    chosen_B[sampled_B] = tokens_BV.gather(-1, torch.minimum(places_B1, last_B1))[:, 0]
    return chosen_B
