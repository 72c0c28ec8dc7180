"""Which finished paths of a tree are continued when it has no other, and where they are cut.

Source: TreePO, arXiv 2508.17445.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dlm_fast.rollout.tree_branching import draw_between
from dlm_fast.rollout.tree_config import BLOCK_CUT, TreeConfig
from dlm_fast.rollout.tree_rules import Reason

ENDED_THEMSELVES = (Reason.ANSWER, Reason.UNCLOSED, Reason.EOS)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A finished path."""

    reason: Reason
    length: int
    """tokens of the response"""


def order_of(
    candidates: Sequence[Candidate], config: TreeConfig, uniforms: Sequence[float]
) -> list[int]:
    """Places of the paths that may be cut, first to be cut first. ``uniforms``: one each."""
    places: Sequence[int] = range(len(candidates))
    if config.fallback == "none":
        return []
    if config.fallback == "strict":
        return sorted(places, key=lambda i: (-candidates[i].reason, i))
    if config.fallback == "weighted":
        keys = [math.log(c.reason) + _gumbel(u) for c, u in zip(candidates, uniforms, strict=True)]
    elif config.fallback == "longest":
        keys = [
            math.log(max(c.length, 1)) + _gumbel(u)
            for c, u in zip(candidates, uniforms, strict=True)
        ]
    else:
        keys = list(uniforms)
        places = [i for i in places if _may_be_cut(candidates[i], config)]
    return sorted(places, key=lambda i: -keys[i])


def _may_be_cut(candidate: Candidate, config: TreeConfig) -> bool:
    if config.fallback == "answer_or_eos":
        return candidate.reason in ENDED_THEMSELVES
    if config.fallback == "answer_min_blocks":
        num_windows = math.ceil(candidate.length / config.window)
        return candidate.reason == Reason.ANSWER and num_windows >= config.fallback_min_blocks
    return True


def _gumbel(uniform: float) -> float:
    """The largest of log(weight) + Gumbel numbers is a draw by weight, the next ones draws
    without replacement."""
    return -math.log(-math.log(uniform))


def tokens_to_keep(
    length: int, config: TreeConfig, uniform: float, logprobs: Sequence[float]
) -> int:
    """How many of a finished path's ``length`` tokens stay, at least one goes. Cuts fall on the
    grid of segments unless they may split one. ``logprobs``: of the tokens, one each."""
    segment = config.segment
    if config.cut == "from_start":
        return 0
    if config.cut == "min_logprob_token":
        keep = min(range(length), key=lambda i: logprobs[i])
    elif config.cut == "random":
        window = config.window
        num_windows = math.ceil(length / window)
        most = min(num_windows, config.max_back or num_windows)
        keep = (num_windows - draw_between(1, most, uniform)) * window
        if not config.allow_split:
            keep = keep // segment * segment
    else:
        keep = BLOCK_CUT * _drawn_block(logprobs, config.cut == "inverse_block", uniform)
    return segment * (config.max_depth - 1) if keep >= segment * config.max_depth else keep


def _drawn_block(logprobs: Sequence[float], prefer_likely: bool, uniform: float) -> int:
    blocks = [logprobs[i : i + BLOCK_CUT] for i in range(0, len(logprobs), BLOCK_CUT)]
    means = [sum(block) / len(block) for block in blocks]
    powers = [mean if prefer_likely else -mean for mean in means]
    weights = [math.exp(power - max(powers)) for power in powers]
    left = uniform * sum(weights)
    for place, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return place
    return len(weights) - 1
