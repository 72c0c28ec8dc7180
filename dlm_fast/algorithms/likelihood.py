"""Log-likelihood of a text under any family: exact where the model is causal, else a lower bound.

    causal   log p(y|q) = sum over i of log p(y_i | q, y_<i)                      exact
    full     B(y|q), the evidence lower bound of ``elbo``, from n masked samples  E <= log p(y|q)
    block    sum over blocks b of B(y_b | q, y_<b): each block is a small diffusion given the ones
             before it; the grid begins at the first token, so a block may begin inside the prompt

Sources: LLaDA, arXiv 2502.09992 (the bound as its evaluation estimates it); block diffusion, arXiv
2503.09573. Shapes: T packed tokens, N scored tokens, K masked copies.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dlm_fast.algorithms.elbo import MaskedCopies, Masking, Sampler
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility
from dlm_fast.rollout.trajectory import Trajectory

Pair = tuple[Tensor, Tensor]
"""int64 [P] context and int64 [R] text after it; no token of the context is scored"""


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How likelihoods of diffusion models are estimated; causal ones need none of it."""

    num_samples: int = 128
    """masked samples per text"""
    sampler: Sampler = "l_strat"
    """how a sample's number of masked tokens is drawn: l_strat spreads it evenly over the samples;
    all samplers have the same mean"""
    seed: int = 0
    """seed of the masks; they depend on it and on the text alone"""
    batch: int = 32
    """sequences in one forward; changes memory and time, not the result"""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"likelihood.{name} must be at least 1, got {getattr(self, name)}")


def loglikelihood(policy: Any, pairs: Sequence[Pair], config: LikelihoodConfig) -> list[float]:
    """log p(text | context) of each pair in nats, or the estimate of its lower bound.

    A text without tokens has 0. Models with a logit shift need at least one token of context.
    """
    totals = [0.0] * len(pairs)
    pieces = [
        (index, piece)
        for index, pair in enumerate(pairs)
        if pair[1].numel()
        for piece in _pieces(pair, policy.family)
    ]
    # like lengths go together; what a pair gets does not depend on its company
    pieces.sort(key=lambda piece: piece[1].input_ids.numel())
    causal = policy.family.kind == "causal"
    per_forward = config.batch if causal else max(1, config.batch // config.num_samples)
    with torch.no_grad():
        for start in range(0, len(pieces), per_forward):
            part = pieces[start : start + per_forward]
            trajectories = [trajectory for _, trajectory in part]
            if causal:
                values = causal_logprobs(policy, trajectories)[0]
            else:
                values = _bounds(policy, trajectories, config)
            for (index, _), value in zip(part, values, strict=True):
                totals[index] += value
    return totals


def causal_logprobs(
    policy: Any, trajectories: Sequence[Trajectory]
) -> tuple[list[float], list[bool]]:
    """Log-probability of each response, and whether each of its tokens is the most likely one."""
    ids_T = torch.cat([t.input_ids for t in trajectories])
    lengths = [t.input_ids.numel() for t in trajectories]
    visibility = Visibility.causal(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    rows_N = torch.cat(
        [
            torch.arange(start + t.prompt_length, start + length)
            for start, length, t in zip(starts, lengths, trajectories, strict=False)
        ]
    )
    targets_N = ids_T[rows_N]
    device = policy.device
    stats = policy.stats(
        ids_T.to(device),
        visibility.to(device),
        rows=policy.predicting_rows(rows_N.to(torch.int32), visibility).to(device),
        targets=targets_N.to(device),
    )
    counts = [t.response_length for t in trajectories]
    logprobs = [part.double().sum().item() for part in stats.logprob.cpu().split(counts)]
    greedy = [bool(part.all()) for part in (stats.token.cpu() == targets_N).split(counts)]
    return logprobs, greedy


def _pieces(pair: Pair, family: Any) -> list[Trajectory]:
    """The pair as responses that are scored each on its own and added up."""
    context, text = pair
    if family.kind != "block":
        return [_trajectory(context, text)]
    ids = torch.cat([context, text])
    edges = [context.numel()]
    while edges[-1] < ids.numel():
        edges.append(min(ids.numel(), (edges[-1] // family.block_size + 1) * family.block_size))
    # a block sees none after it, so the rest of the text is left out
    return [_trajectory(ids[:a], ids[a:b]) for a, b in itertools.pairwise(edges)]


def _trajectory(context: Tensor, text: Tensor) -> Trajectory:
    digest = hashlib.sha256(repr((context.tolist(), text.tolist())).encode()).digest()
    return Trajectory(
        prompt_ids=context,
        response_ids=text,
        sequence_id=int.from_bytes(digest[:8], "little") >> 1,
    )


def _bounds(
    policy: Any, trajectories: Sequence[Trajectory], config: LikelihoodConfig
) -> list[float]:
    """Mean of ell over the samples of each response."""
    masking = Masking(
        mask_id=policy.family.mask_id,
        seed=config.seed,
        sampler=config.sampler,
        num_samples=config.num_samples,
    )
    total_R = torch.zeros(len(trajectories), dtype=torch.float64)
    count = max(1, config.batch // len(trajectories))
    for first in range(0, config.num_samples, count):
        drawn = masking.draw(trajectories, first, min(count, config.num_samples - first))
        copies = _under_attention(drawn, policy.family).to(policy.device)
        rows_N = policy.predicting_rows(copies.rows, copies.visibility)
        request = ScoreRequest(rows=rows_N, targets=copies.targets)
        output = policy(copies.input_ids, copies.visibility, score=request)
        total_R.index_add_(0, copies.response_K, copies.ell(output.logprob.double()).cpu())
    return (total_R / config.num_samples).tolist()


def _under_attention(copies: MaskedCopies, family: Any) -> MaskedCopies:
    if family.kind == "full":
        return copies
    lengths = copies.visibility.lengths
    return replace(copies, visibility=Visibility.block_causal(lengths, family.block_size))
