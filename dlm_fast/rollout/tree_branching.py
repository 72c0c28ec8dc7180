"""How many copies the paths of a tree get: the budget, and who gets how much of it.

Source: TreePO, arXiv 2508.17445 (``T`` copies, ``w`` leaves, ``F`` finished, ``b`` branch,
``l`` segment).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dlm_fast.rollout.tree_config import TreeConfig


def total_copies(*, limit: int, branch: int, active: int, just_finished: int) -> int:
    """Copies of the ``active`` paths, at least one each: ``branch`` times the paths of the step
    before, so that those that just finished pass their share on, but at most ``limit`` (the leaves
    still to come)."""
    return max(active, min(limit, branch * (active + just_finished)))


def first_copies(config: TreeConfig, *, leaves: int, num_trees: int, uniform: float) -> int:
    """Copies of the prompt. ``uniform`` draws between ``first_branch`` and its maximum."""
    if config.budget == "step_tokens":
        assert config.token_budget is not None
        return min(max(config.token_budget // config.segment // num_trees, 1), leaves)
    return min(draw_between(config.first_branch, config.first_branch_max, uniform), leaves)


def draw_between(least: int, most: int | None, uniform: float) -> int:
    """A whole number from ``least`` to ``most``, both included; None: always ``least``."""
    if most is None:
        return least
    return least + min(int(uniform * (most - least + 1)), most - least)


def step_limit(config: TreeConfig, *, leaves: int, finished: int, num_live_trees: int) -> int:
    """Most paths of a tree's next step."""
    limit = leaves - finished
    if config.budget == "step_tokens":
        assert config.token_budget is not None
        limit = min(limit, config.token_budget // num_live_trees // config.segment)
    return limit


def width_for_tokens(
    config: TreeConfig, *, finished: int, finished_tokens: int, mean_length: float
) -> int:
    """Leaves that the budget ``response_tokens`` affords when ``mean_length`` tokens is the length
    that paths have now."""
    assert config.token_budget is not None
    left = max(0.0, config.token_budget - finished_tokens)
    width = finished + int(left // (mean_length + config.segment))
    return max(config.min_width, min(width, config.max_width))


def share_evenly(total: int, count: int, last_takes_rest: bool = False) -> list[int]:
    """``total`` over ``count`` paths; what is left over goes one by one to the first ones, or to
    the last one as in the paper's code."""
    each, rest = divmod(total, count)
    if last_takes_rest:
        return [each] * (count - 1) + [each + rest]
    return [each + (place < rest) for place in range(count)]


def share_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """One each; the rest in proportion to the weights (which add up to 1) by largest remainder,
    ties to the first."""
    rest = total - len(weights)
    exact = [rest * weight for weight in weights]
    shares = [math.floor(part) for part in exact]
    # rounding must not decide a tie: equal remainders go by place
    order = sorted(range(len(weights)), key=lambda i: (-round(exact[i] - shares[i], 9), i))
    for place in order[: rest - sum(shares)]:
        shares[place] += 1
    return [1 + share for share in shares]


def logprob_weights(scores: Sequence[float], *, prefer: str, temperature: float) -> list[float]:
    """Softmax of the scores, or of minus them where low ones are preferred."""
    sign = -1.0 if prefer == "low" else 1.0
    powers = [sign * (score - min(scores)) / temperature for score in scores]
    top = max(powers)
    exponentials = [math.exp(power - top) for power in powers]
    return [e / sum(exponentials) for e in exponentials]


def temperature_at(config: TreeConfig, progress: float) -> float:
    """The temperature of ``share=logprob`` after this part of the training, 0 to 1: along half a
    sine wave from its start to its end, or constant."""
    start, end = config.share_temperature, config.share_temperature_end
    if end is None:
        return start
    return (start + end) / 2 + (end - start) / 2 * math.sin(math.pi * progress - math.pi / 2)
