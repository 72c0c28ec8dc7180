"""Token losses of clipped policy optimisation, and how they are averaged.

With D = logp - logp_old, rho = exp(D):

    policy   -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
             dual clip: where A < 0, at most -c A
    k1 = D     k2 = D^2 / 2     k3 = exp(-D) - 1 + D        estimators of KL[pi || pi_old]
    value    0.5 max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)

Sources: PPO, arXiv 1707.06347; dual clip: arXiv 1912.09729; the estimators: J. Schulman,
"Approximating KL divergence" (2020); averaging: TraceRL, arXiv 2509.06949, equation 3, and its open
trainer.

Letters: ``U`` target tokens.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 10.0
"""log-ratios are cut here before the exponential: exp(10) is beyond any meaningful ratio"""

KL = Literal["k1", "k2", "k3"]
LossAgg = Literal["token_mean", "step_mean", "slice_mean", "slice_len", "seq_mean_len"]


def clipped_objective(
    log_ratio_U: Tensor,
    advantage_U: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = math.inf,
) -> Tensor:
    """[U], min(rho A, clip(rho) A), differentiable in the log-ratio.

    ``dual_clip``: c, above 1; a token with A < 0 gets no gradient beyond the ratio c.
    """
    ratio_U = log_ratio_U.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_U = ratio_U.clamp(1 - clip_low, 1 + clip_high)
    gain_U = torch.minimum(ratio_U * advantage_U, clipped_U * advantage_U)
    if dual_clip == math.inf:
        return gain_U
    return torch.where(advantage_U < 0, torch.maximum(gain_U, dual_clip * advantage_U), gain_U)


def kl_estimate(log_ratio_U: Tensor, kind: KL) -> Tensor:
    """[U], from D = logp - logp_old of tokens that the old policy drew.

    k1 as a loss has gradient 1 per token whatever D is; k2 and k3 pull towards the old policy.
    """
    if kind == "k1":
        return log_ratio_U
    if kind == "k2":
        return log_ratio_U.square() / 2
    bounded_U = log_ratio_U.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (-bounded_U).exp() - 1 + bounded_U


def clipped_value_loss(
    value_U: Tensor, old_value_U: Tensor, return_U: Tensor, clip: float
) -> Tensor:
    """[U], differentiable in the value."""
    near_U = old_value_U + (value_U - old_value_U).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_U - return_U).square(), (near_U - return_U).square())


class Averaging(NamedTuple):
    """A loss is the sum of share * term over its targets, divided by the global ``divisor``."""

    share: Tensor
    """float64 [U]"""
    divisor: float
    """of this rank; summed over ranks it divides"""


def averaging(
    agg: LossAgg, sequence_U: Tensor, slice_U: Tensor, step_U: Tensor, padded_length: int = 0
) -> Averaging:
    """How the terms of all target tokens of a batch are averaged.

    token_mean     over all targets
    seq_mean_len   over the targets of a response, then over responses
    step_mean      over the tokens of a step, summed over the steps of a response, then over
                   responses (equation 3 of TraceRL)
    slice_mean     over the targets of a slice, then over slices
    slice_len      summed over a slice and divided by ``padded_length``, then over slices: depends
                   on the padding of a trainer that pads, and is here to reproduce one

    ``slice_U``: number of the forward pass within the response that a one-pass-per-slice trainer
    would score the target in.
    """
    ones_U = torch.ones(sequence_U.shape, dtype=torch.float64, device=sequence_U.device)
    if agg == "token_mean":
        return Averaging(ones_U, float(ones_U.numel()))
    responses = float(sequence_U.unique().numel())
    if agg == "seq_mean_len":
        return Averaging(1 / _size_of_group(sequence_U), responses)
    if agg == "step_mean":
        return Averaging(1 / _size_of_group(sequence_U, step_U), responses)
    slices = float(torch.stack([sequence_U, slice_U]).unique(dim=1).shape[1])
    if agg == "slice_mean":
        return Averaging(1 / _size_of_group(sequence_U, slice_U), slices)
    if padded_length < 1:
        raise ValueError(
            f"loss_agg=slice_len divides by the padded length of a response; got {padded_length}"
        )
    return Averaging(ones_U / padded_length, slices)


def _size_of_group(*keys_U: Tensor) -> Tensor:
    """float64 [U]: how many targets share all keys with each."""
    of_target, count = torch.stack(keys_U).unique(dim=1, return_inverse=True, return_counts=True)[
        1:
    ]
    return count[of_target].double()
