"""From a model's logits to the next token of each row, on the device: penalties, masks, temperature, top-k, ...

Draws are a function of a row's seed and of the position alone (a counter, no generator's state), so a request with a
seed has the same text in any company, and a row that was preempted goes on as it would have.
Shapes: B rows, V entries of the vocabulary, K candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CANDIDATES = 256  # on CPU a row is sorted beyond its likeliest 256 only if its nucleus is wider
NOT_FINITE = -1  # in place of the token of a row whose logits are not numbers
_MASK_64 = (1 << 64) - 1
_MASK_53 = (1 << 53) - 1


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of a batch, a column each. Temperature 0: greedy. `top_k` 0: all."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor  # int64, of `row_seed`

    def of(self, rows: Tensor) -> "SamplingRows":
        """Select rows."""
        return SamplingRows(
            self.temperature_B[rows], self.top_k_B[rows], self.top_p_B[rows], self.min_p_B[rows], self.seed_B[rows]
        )


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """Penalties of a batch and what they count."""

    repetition_B: Tensor  # Keskar et al. 2019, section 4.1: of all tokens in the prompt and the output
    presence_B: Tensor  # of tokens in the output, once
    frequency_B: Tensor  # of tokens in the output, each time
    in_prompt_BV: Tensor  # bool
    num_in_output_BV: Tensor  # int32
    bias_BV: Tensor  # added in the end


def row_seed(seed: int, sequence: int) -> int:
    """Mix a request's seed with the number of the sequence among those of one prompt; as int64."""
    mixed = _mixed_int((seed ^ _mixed_int(sequence + 0x9E3779B97F4A7C15)) & _MASK_64)
    return mixed - (1 << 64) if mixed >> 63 else mixed


def draw(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """Return a uniform float64 in [0, 1) for each row: SplitMix64 of seed and position (Steele et al. 2014)."""
    bits_B = seed_B + position_B * -7046029254386353131  # 0x9E3779B97F4A7C15, as int64; it wraps as it should
    bits_B = (bits_B ^ _shifted(bits_B, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    bits_B = (bits_B ^ _shifted(bits_B, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    bits_B = bits_B ^ _shifted(bits_B, 31)
    return (bits_B & _MASK_53).double() * 2.0**-53


def penalized(logits_BV: Tensor, rows: PenaltyRows) -> Tensor:
    """Lower the logits of tokens that were seen."""
    seen_BV = rows.in_prompt_BV | (rows.num_in_output_BV > 0)
    factor_B1 = rows.repetition_B[:, None]
    lowered_BV = torch.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
    logits_BV = torch.where(seen_BV, lowered_BV, logits_BV)
    logits_BV = logits_BV - rows.frequency_B[:, None] * rows.num_in_output_BV
    return logits_BV - rows.presence_B[:, None] * (rows.num_in_output_BV > 0) + rows.bias_BV


def masked(logits_BV: Tensor, allowed_BW: Tensor) -> Tensor:
    """Ban the tokens whose bit is not set; the lowest bit of a row's first word is token 0's."""
    bits = torch.arange(32, dtype=torch.int32, device=allowed_BW.device)
    allowed_BV = ((allowed_BW[:, :, None] >> bits) & 1).bool().flatten(1)[:, : logits_BV.shape[1]]
    return torch.where(allowed_BV, logits_BV, -torch.inf)


def log_probabilities(logits_BV: Tensor, chosen_B: Tensor, num_likeliest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each row the chosen token's log-probability (B,), and the likeliest tokens and theirs (B, K).

    They are the model's own: before penalties, bans and the temperature.
    """
    size = min(num_likeliest, logits_BV.shape[1])
    logprobs_BV = logits_BV.float().log_softmax(dim=-1)
    likeliest = torch.topk(logprobs_BV, size, dim=-1)
    return logprobs_BV.gather(1, chosen_B.clamp(min=0)[:, None])[:, 0], likeliest.indices, likeliest.values


def choose(
    logits_BV: Tensor,
    position_B: Tensor,
    rows: SamplingRows | None = None,
    penalties: PenaltyRows | None = None,
    allowed_BW: Tensor | None = None,
) -> Tensor:
    """Return the next token of each row, (B,) int64; `NOT_FINITE` where the logits are NaN or infinite.

    Args:
        logits_BV: of any float type.
        position_B: of the token that is chosen, in its sequence.
        rows: how to sample; none: greedy.
        penalties: what was seen before, and how much it counts; none: nothing.
        allowed_BW: the tokens that may be chosen, a bit each, as int32; none: all.
    """
    best_B = logits_BV.max(dim=-1)
    # -inf is a ban, not a fault; NaN is the maximum of all
    finite_B = best_B.values.isfinite()
    chosen_B = best_B.indices
    if penalties is not None:
        logits_BV = penalized(logits_BV.float(), penalties)
    if allowed_BW is not None:
        logits_BV = masked(logits_BV.float(), allowed_BW)
    if penalties is not None or allowed_BW is not None:
        best_B = logits_BV.max(dim=-1)
        finite_B = finite_B & best_B.values.isfinite()  # or all are banned
        chosen_B = best_B.indices
    if rows is not None:
        logits_BV = torch.where(finite_B[:, None], logits_BV.float(), 0.0)
        if logits_BV.device.type == "cpu" and not torch.compiler.is_compiling():
            chosen_B = _sampled_where_asked(logits_BV, chosen_B, position_B, rows)
        else:  # nothing here may wait for the device: it is part of a CUDA graph
            sampled_B = _sampled_by_sorting(_scaled(logits_BV, rows), draw(rows.seed_B, position_B), rows)
            chosen_B = torch.where(rows.temperature_B > 0, sampled_B, chosen_B)
    return torch.where(finite_B, chosen_B, NOT_FINITE)


def _sampled_where_asked(logits_BV: Tensor, greedy_B: Tensor, position_B: Tensor, rows: SamplingRows) -> Tensor:
    """Sample rows with a temperature, each in the cheapest way; which one depends on its own parameters alone."""
    asked = (rows.temperature_B > 0).nonzero()[:, 0]
    if not len(asked):
        return greedy_B
    chosen_B = greedy_B.clone()
    rows, logits_BV = rows.of(asked), logits_BV[asked]
    scaled_BV, draws_B = _scaled(logits_BV, rows), draw(rows.seed_B, position_B[asked])
    free_B = (rows.top_p_B >= 1) & (rows.top_k_B <= 0) & (rows.min_p_B <= 0)
    for places, sample in ((free_B, _sampled_from_all), (~free_B, _sampled_from_few)):
        if len(some := places.nonzero()[:, 0]):
            chosen_B[asked[some]] = sample(scaled_BV[some], draws_B[some], rows.of(some))
    return chosen_B


def _sampled_from_all(scaled_BV: Tensor, draws_B: Tensor, _rows: SamplingRows) -> Tensor:
    edges_BV = scaled_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    return _fall(edges_BV, draws_B)


def _sampled_from_few(scaled_BV: Tensor, draws_B: Tensor, rows: SamplingRows) -> Tensor:
    """Look at the likeliest only, and sort the rows for which that is not enough."""
    size = min(MAX_CANDIDATES, scaled_BV.shape[-1])
    candidates_BK = torch.topk(scaled_BV, size, dim=-1)
    mass_B = scaled_BV.exp().sum(dim=-1, dtype=torch.float64)
    by_rank_B = (rows.top_k_B > 0) & (rows.top_k_B <= size)
    mass_BK = candidates_BK.values.double().exp().sum(dim=-1)
    by_mass_B = (rows.top_k_B <= 0) & (mass_BK >= rows.top_p_B.double() * mass_B)
    by_minimum_B = (rows.min_p_B > 0) & (candidates_BK.values[:, -1].exp() < rows.min_p_B) & (rows.top_k_B <= 0)
    enough_B = by_rank_B | by_mass_B | by_minimum_B | (size == scaled_BV.shape[-1])
    places_BK = _fallen_rank(candidates_BK.values, torch.where(by_rank_B, mass_BK, mass_B), draws_B, rows)
    chosen_B = candidates_BK.indices.gather(-1, places_BK[:, None])[:, 0]
    if len(wide := (~enough_B).nonzero()[:, 0]):
        chosen_B[wide] = _sampled_by_sorting(scaled_BV[wide], draws_B[wide], rows.of(wide))
    return chosen_B


def _sampled_by_sorting(scaled_BV: Tensor, draws_B: Tensor, rows: SamplingRows) -> Tensor:
    sorted_BV, tokens_BV = torch.sort(scaled_BV, dim=-1, descending=True, stable=True)
    rank_B = _fallen_rank(sorted_BV, sorted_BV.double().exp().sum(dim=-1), draws_B, rows)
    return tokens_BV.gather(-1, rank_B[:, None])[:, 0]


def _fallen_rank(sorted_BK: Tensor, mass_B: Tensor, draws_B: Tensor, rows: SamplingRows) -> Tensor:
    """Return the rank that the draw falls on, after top-k, then top-p (Holtzman et al. 2020, section 3.1), then min-p.

    Args:
        sorted_BK: logits in falling order, relative to the largest.
        mass_B: of the whole vocabulary, in the same measure.
        draws_B: uniform.
        rows: the parameters.
    """
    weights_BK = sorted_BK.double().exp()
    ranks_K = torch.arange(sorted_BK.shape[-1], device=sorted_BK.device)
    first_BK = (rows.top_k_B[:, None] <= 0) | (ranks_K < rows.top_k_B[:, None])
    weights_BK = weights_BK * first_BK
    mass_B = torch.where(rows.top_k_B > 0, weights_BK.sum(dim=-1), mass_B)
    before_BK = weights_BK.cumsum(dim=-1) - weights_BK
    kept_BK = first_BK & (before_BK < (rows.top_p_B.double() * mass_B)[:, None])
    kept_BK &= weights_BK >= rows.min_p_B[:, None]
    kept_BK |= ranks_K == 0
    return _fall((weights_BK * kept_BK).cumsum(dim=-1), draws_B)


def _fall(edges_BK: Tensor, draws_B: Tensor) -> Tensor:
    """Return the place in [0, K) that each draw falls on; a place without weight is never one."""
    total_B1 = edges_BK[:, -1:]
    # the product may round up to the total, behind the last place that has weight
    aims_B1 = torch.minimum(draws_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(edges_BK, aims_B1, right=True)[:, 0]


def _scaled(logits_BV: Tensor, rows: SamplingRows) -> Tensor:
    """Divide by the temperature, relative to the maximum: no temperature, however small, makes it overflow."""
    relative_BV = logits_BV - logits_BV.max(dim=-1, keepdim=True).values
    temperature_B1 = torch.where(rows.temperature_B > 0, rows.temperature_B, 1.0)[:, None]
    return relative_BV / temperature_B1


def _shifted(bits_B: Tensor, by: int) -> Tensor:
    """Shift right without the sign."""
    return (bits_B >> by) & ((1 << (64 - by)) - 1)


def _mixed_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
