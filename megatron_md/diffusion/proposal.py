"""Proposals: one token for every open position, drawn from the denoiser's logits, and how sure the denoiser is of it.

Shape letters: B rows, K positions of the block, V vocabulary, N open positions of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_md.errors import UserError

_LOGITS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Proposal:
    """A token for each open position of a block; the confidences are fp32 and 0 where nothing is open.

    Attributes:
        tokens_BK: proposed tokens.
        probability_BK: the denoiser's probability of each.
        margin_BK: its largest probability less its second largest.
        negative_entropy_BK: sum of p log p over its tokens.
    """

    tokens_BK: torch.Tensor
    probability_BK: torch.Tensor
    margin_BK: torch.Tensor
    negative_entropy_BK: torch.Tensor


def propose(
    logits_BKV: torch.Tensor,
    is_open_BK: torch.Tensor,
    generators: Sequence[torch.Generator],
    *,
    excluded: tuple[int, ...],
    deferred: tuple[int, ...] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Proposal:
    """Draw a token for each open position.

    The confidences are those of softmax(logits) without the excluded tokens, before temperature and top-p (as LLaDA's;
    Dream takes them after).

    Args:
        logits_BKV: of any float type.
        is_open_BK: where to propose.
        generators: on the logits' device, one for all rows or one for each. With its own, a row's draws do not depend
            on the other rows.
        excluded: tokens that are never proposed.
        deferred: tokens that are proposed without confidence: their probability is 0, margin and negative entropy are
            -inf, and the confidences of the others are without them (LLaDA's `confidence_eos_eot_inf`).
        temperature: T; 0 takes the likeliest token.
        top_p: see `keep_top_p`.

    Raises:
        UserError: an excluded or deferred token lies outside the columns of the logits.
    """
    tokens_BK = torch.zeros_like(is_open_BK, dtype=torch.long)
    figures_3BK = torch.zeros(3, *is_open_BK.shape, dtype=torch.float32, device=is_open_BK.device)
    open_N2 = is_open_BK.nonzero()
    shares = [open_N2] if len(generators) == 1 else [open_N2[open_N2[:, 0] == b] for b in range(len(generators))]
    # A part of the positions at a time: float64 noise over a large vocabulary is big.
    size = max(1, _LOGITS_AT_ONCE // logits_BKV.shape[-1])
    parts = [(part, g) for share, g in zip(shares, generators, strict=True) for part in torch.split(share, size)]
    for index_N2, generator in parts:
        row_N, column_N = index_N2.unbind(dim=1)
        logits_NV = exclude(logits_BKV[row_N, column_N].float(), excluded)
        token_N = _draw(logits_NV, generator, temperature, top_p)
        tokens_BK[row_N, column_N] = token_N
        probability_NV = exclude(logits_NV, deferred).softmax(dim=-1)
        figures_3BK[0, row_N, column_N] = probability_NV.gather(1, token_N[:, None])[:, 0]
        figures_3BK[1, row_N, column_N] = margin(probability_NV)
        figures_3BK[2, row_N, column_N] = -torch.special.entr(probability_NV).sum(dim=-1)
    if deferred:
        is_deferred_BK = is_open_BK & torch.isin(tokens_BK, tokens_BK.new_tensor(deferred))
        figures_3BK[1:, is_deferred_BK] = -torch.inf
    return Proposal(tokens_BK, *figures_3BK)


def _draw(logits_NV: torch.Tensor, generator: torch.Generator, temperature: float, top_p: float) -> torch.Tensor:
    """Tokens from softmax(logits / T), cut to the nucleus; the likeliest at T = 0."""
    if temperature == 0.0:
        return logits_NV.argmax(dim=-1)
    if top_p < 1.0:
        logits_NV = keep_top_p(logits_NV, temperature, top_p)
    uniforms_NV = torch.rand(logits_NV.shape, dtype=torch.float64, device=logits_NV.device, generator=generator)
    return gumbel_scores(logits_NV, temperature, uniforms_NV).argmax(dim=-1)


def exclude(logits: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits [..., V] with these columns at -inf, so that the softmax is over the other tokens.

    Raises:
        UserError: a token lies outside the columns.
    """
    logits = logits.clone()
    for token in tokens:
        if not 0 <= token < logits.shape[-1]:
            raise UserError(f"token {token} lies outside the {logits.shape[-1]} columns of the logits")
        logits[..., token] = -torch.inf
    return logits


def gumbel_scores(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
    """Logarithm of exp(logits) / (-log u)^T in float64: its argmax is a sample from softmax(logits / T).

    In float32 a Gumbel number ends at 24 log 2, which starves rare tokens (Zheng et al. 2024).

    Args:
        logits: [..., V].
        temperature: T; 0 leaves the logits as they are.
        uniforms: u in [0, 1), float64, of the logits' shape.
    """
    if temperature == 0.0:
        return logits
    return logits.double() - temperature * torch.log(-torch.log(uniforms))


def keep_top_p(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Logits [..., V] with all but the nucleus at -inf (Holtzman et al. 2020).

    The nucleus is the smallest set of likeliest tokens whose probability under softmax(logits / T) reaches `top_p`; of
    equal tokens the first ones.
    """
    sorted_p, order = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    is_outside = torch.zeros_like(order, dtype=torch.bool).scatter(
        -1, order, sorted_p.cumsum(dim=-1) - sorted_p >= top_p
    )
    return logits.masked_fill(is_outside, -torch.inf)


def margin(probability: torch.Tensor) -> torch.Tensor:
    """Largest less second largest of [..., V]."""
    best = probability.topk(min(2, probability.shape[-1]), dim=-1).values
    return best[..., 0] - best[..., 1] if best.shape[-1] == 2 else best[..., 0]


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance u + (1 + w)(c - u) of logits c given the prompt and u without it (LLaDA's `cfg_scale`).

    Tokens that either never predicts (-inf) stay impossible.
    """
    guided = unconditional + (1.0 + guidance) * (conditional - unconditional)
    is_possible = conditional.isfinite() & unconditional.isfinite()
    return torch.where(is_possible, guided, torch.full_like(guided, -torch.inf))
