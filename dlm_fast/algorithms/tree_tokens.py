"""The target tokens of trees: weights that make one loss of all leaves that share a token.

With weights c_i of leaves (token_mean: 1 / all tokens; seq_mean_len: 1 / (leaves * tokens of i)),
over the leaves i that contain token u:

    A+ = sum c_i max(A_i, 0)     A- = sum c_i max(-A_i, 0)     n = sum c_i

A loss that is piecewise linear in A, such as the clipped one, has kinks that depend on A's sign
alone, so its sum over leaves is its value at A+ plus its value at -A-, exactly. One weight, their
difference, would be right at ratio 1 only.

Letters: ``N`` nodes, ``W`` leaves, ``Q`` pairs of leaf and node, ``U`` target tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlm_fast.algorithms.clipped_loss import KL, MAX_LOG_RATIO, kl_estimate
from dlm_fast.algorithms.contract import Largest, Metrics
from dlm_fast.algorithms.tree_rows import NodeTokens, TreeRows
from dlm_fast.rollout.tree import Forest

TreeAgg = Literal["token_mean", "seq_mean_len"]


@dataclass(kw_only=True, eq=False)
class TreeTokens:
    """A forward pass and the numbers of its target tokens, float64 [U] each."""

    rows: TreeRows
    plus: Tensor
    """A+, before the division"""
    minus: Tensor
    """A-"""
    share: Tensor
    """n"""
    divisor: float
    """of all three, over all ranks"""
    rollout: Tensor
    """log-probability as recorded while decoding; NaN where nothing was"""
    old: Tensor | None = None
    """log pi_old; None: the policy has not moved yet, so it is the new one"""
    reference: Tensor | None = None
    """log-probability under the reference policy, where the divergence is from it"""


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeWeights:
    """A+, A- and n of the tokens of each node, and what they are divided by."""

    plus_N: Tensor
    minus_N: Tensor
    share_N: Tensor
    divisor: float
    """of this rank; summed over ranks it divides"""


def target_counts(forest: Forest, tokens: Sequence[NodeTokens]) -> Tensor:
    """int64 [N]: targets of each node."""
    counts = [int(learnt.sum()) for own in tokens for learnt in own.trainable]
    return torch.tensor(counts, dtype=torch.int64)


def node_weights(
    forest: Forest, advantage_Q: Tensor, target_count_N: Tensor, agg: TreeAgg
) -> NodeWeights:
    """The two weights and the count of each node, float64 [N]."""
    leaf_Q, node_Q = forest.pairs
    count_Q = target_count_N[node_Q].double()
    zeros_W = torch.zeros(forest.num_leaves, dtype=torch.float64)
    length_W = zeros_W.index_add(0, leaf_Q, count_Q)
    if agg == "token_mean":
        weight_W, divisor = torch.ones_like(zeros_W), float(length_W.sum())
    else:
        weight_W, divisor = 1 / length_W.clamp(min=1), float((length_W > 0).sum())
    zeros_N = torch.zeros(forest.num_nodes, dtype=torch.float64)
    weight_Q = weight_W[leaf_Q]
    plus_N, minus_N, share_N = (
        zeros_N.index_add(0, node_Q, weight_Q * part_Q)
        for part_Q in (
            advantage_Q.clamp(min=0),
            (-advantage_Q).clamp(min=0),
            torch.ones_like(advantage_Q),
        )
    )
    return NodeWeights(plus_N=plus_N, minus_N=minus_N, share_N=share_N, divisor=divisor)


def tree_tokens(rows: TreeRows, forest: Forest, weights: NodeWeights) -> TreeTokens:
    """Of one forward pass, on its device; the divisor is this rank's until it is set."""
    token_U = rows.token.cpu()
    node_U = forest.node_of_token[token_U]
    device = rows.token.device
    return TreeTokens(
        rows=rows,
        plus=weights.plus_N[node_U].to(device),
        minus=weights.minus_N[node_U].to(device),
        share=weights.share_N[node_U].to(device),
        divisor=weights.divisor,
        rollout=forest.logp[token_U].double().to(device),
    )


def token_metrics(
    micro: TreeTokens,
    logprob_U: Tensor,
    log_ratio_U: Tensor,
    clip: tuple[float, float],
    kl: KL,
) -> Metrics:
    """Means over the tokens of all leaves, read from the device in one go.

    A shared token counts once for each leaf, weighted as in the loss.
    """
    logprob_U, log_ratio_U = logprob_U.detach().double(), log_ratio_U.detach()
    ratio_U = log_ratio_U.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = clip
    stopped_U = micro.plus * (ratio_U > 1 + high) + micro.minus * (ratio_U < 1 - low)
    size_U = micro.plus + micro.minus
    old_U = logprob_U if micro.old is None else micro.old
    gap_U = (old_U - micro.rollout).abs()
    is_known_U = ~gap_U.isnan()
    gap_U = gap_U.nan_to_num(0.0)
    named = {
        "policy/logprob": (logprob_U * micro.share, micro.share),
        "policy/ratio_mean": (ratio_U * micro.share, micro.share),
        "policy/clip_fraction": (stopped_U, size_U),
        "policy/kl": (kl_estimate(log_ratio_U, kl) * micro.share, micro.share),
        "policy/advantage": (micro.plus - micro.minus, micro.share),
        "policy/advantage_size": (size_U, micro.share),
        "tree/mismatch": (gap_U, is_known_U.double()),
    }
    sums = [part.sum() for pair in named.values() for part in pair]
    numbers = torch.stack([*sums, gap_U.max() if gap_U.numel() else gap_U.sum()]).tolist()
    metrics: Metrics = {name: (numbers[2 * k], numbers[2 * k + 1]) for k, name in enumerate(named)}
    return metrics | {"tree/mismatch_largest": Largest(numbers[-1])}
