"""Clipped objectives over whole responses: ratios of tokens or of sequences, over the kept tokens.

    d_k = log p(o_k) - log p_old(o_k)
    token      rho_k = exp(d_k)
    sequence   rho   = exp(mean of d_k over the kept tokens)             ratio_mask=kept
               rho   = exp(mean of d_k over the whole window)            ratio_mask=all

Under ``all`` every token has a gradient, kept or not, as in IGPO's released code. Sources: IGPO,
arXiv 2509.10396; GSPO, arXiv 2507.18071 (sequence ratios); GRPO, arXiv 2402.03300.

Letters: ``R`` responses, ``L`` positions of the window.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlm_fast.algorithms.clipped_loss import MAX_LOG_RATIO, clipped_objective, kl_estimate

RatioLevel = Literal["sequence", "token"]
RatioMask = Literal["kept", "all"]
SequenceAgg = Literal["seq_mean", "token_mean"]

_ROUNDING = 1e-9
"""tau * count may come out just below the integer that it is"""


class Terms(NamedTuple):
    """Of every position, 0 where none is kept."""

    gain: Tensor
    """[R, L], the clipped objective"""
    ratio: Tensor
    """[R, L], rho at each position, detached"""


def objective(
    log_ratio_RL: Tensor,
    advantage_R: Tensor,
    keep_RL: Tensor,
    *,
    level: RatioLevel,
    mask: RatioMask,
    clip_low: float,
    clip_high: float,
) -> Terms:
    """Differentiable in ``log_ratio_RL``; what it holds at positions that are not kept matters only
    under ``all``, where it should be 0 for tokens that do not exist."""
    if level == "sequence":
        over_RL = keep_RL if mask == "kept" else torch.ones_like(keep_RL)
        total_R = torch.where(over_RL, log_ratio_RL, 0.0).sum(1)
        mean_R = total_R / over_RL.sum(1).clamp(min=1)
        log_ratio_RL = mean_R[:, None].expand_as(log_ratio_RL)
    else:
        log_ratio_RL = torch.where(keep_RL, log_ratio_RL, 0.0)
    gain_RL = clipped_objective(
        log_ratio_RL, advantage_R[:, None].expand_as(log_ratio_RL), clip_low, clip_high
    )
    ratio_RL = log_ratio_RL.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return Terms(torch.where(keep_RL, gain_RL, 0.0), ratio_RL)


def divergence(logprob_RL: Tensor, reference_RL: Tensor, keep_RL: Tensor) -> Tensor:
    """[R, L], the k3 estimate of the divergence from the reference, 0 where none is kept."""
    difference_RL = torch.where(keep_RL, logprob_RL - reference_RL, 0.0)
    return kl_estimate(difference_RL, "k3")


def averaged(terms_RL: Tensor, keep_RL: Tensor, agg: SequenceAgg) -> Tensor:
    """Sum of the terms, weighted as ``agg`` says; ``agg_divisor`` is what divides it.

    seq_mean: over the kept tokens of a response, then over responses. token_mean: over all kept.
    """
    if agg == "token_mean":
        return torch.where(keep_RL, terms_RL, 0.0).sum()
    count_R = keep_RL.sum(1).clamp(min=1)
    return (torch.where(keep_RL, terms_RL, 0.0).sum(1) / count_R).sum()


def agg_divisor(keep_RL: Tensor, agg: SequenceAgg) -> float:
    """Of these responses; the divisor of an optimizer step is the sum over all of them."""
    return float(len(keep_RL) if agg == "seq_mean" else keep_RL.sum())


def kept_hints(entropy_L: Tensor, hint_L: Tensor, share: float) -> Tensor:
    """bool [L]: the ``share`` of hint positions of largest entropy, at least one if there is any.

    Equal entropies: the first positions. floor(share * count) of them, in exact arithmetic.
    """
    places = hint_L.nonzero()[:, 0]
    kept = torch.zeros_like(hint_L)
    if places.numel():
        count = max(1, int(share * places.numel() + _ROUNDING))
        order = torch.sort(entropy_L[places], descending=True, stable=True).indices
        kept[places[order[:count]]] = True
    return kept
