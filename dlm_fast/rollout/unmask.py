"""Which masked positions a denoising step reveals: the seam between the loop and its rules.

Letters: ``A`` rows in the batch, ``W`` positions of the window, ``N`` positions with statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlm_fast.ops import Rng, TokenStats, unmask_select
from dlm_fast.rollout.sampler_config import ENTROPY_RULES, SamplerConfig

_LOWEST_ENTROPY_SCORE = -1e4  # below minus the entropy of any vocabulary, and finite


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a rule sees at one step. Rows are the rows of this forward, in the order of
    ``sequence_A``."""

    stats: TokenStats
    """statistics of the positions with statistics, each [N]"""
    score_N: Tensor
    """float32, confidence after ``rollout.confidence`` and ``rollout.forbid_eos_confidence``"""
    row_N: Tensor
    """int64, row of each position with statistics"""
    column_N: Tensor
    """int64, its place in the window"""
    masked_AW: Tensor
    """bool, still masked anywhere in the window"""
    selectable_AW: Tensor
    """bool, still masked in the row's current block: only these may be chosen"""
    quota_A: Tensor
    """int32, reveals that the schedule of ``rollout.steps`` asks for, at least 1"""
    step_A: Tensor
    """int32, forwards the row took part in before this one"""
    block_step_A: Tensor
    """int32, those since its current block began"""
    sequence_A: Tensor
    """int64, index into the prompts of the call: the same through all steps of a row"""
    rng: Rng
    """random numbers of stream UNMASK, one key a row, at the row's step"""

    def spread(self, values_N: Tensor, fill: float) -> Tensor:
        """[A, W] with the values at their places and ``fill`` elsewhere."""
        spread_AW = values_N.new_full(self.masked_AW.shape, fill)
        spread_AW[self.row_N, self.column_N] = values_N
        return spread_AW


class UnmaskRule(Protocol):
    """Chooses the positions to reveal; a heuristic or a learned policy."""

    whole_window: bool
    """statistics at every position of the window, revealed ones included; else at selectable
    ones"""
    may_idle: bool
    """a step may reveal nothing. A block then closes after as many steps as it has positions and
    what is still masked keeps the mask id (a learned policy in training)"""

    def __call__(self, decision: Decision) -> Tensor:
        """bool [A, W], True where a token is revealed; a subset of ``selectable_AW``."""
        ...


class ConfiguredRule:
    """The rule that ``SamplerConfig.rule`` names."""

    whole_window = False
    may_idle = False

    def __init__(self, config: SamplerConfig) -> None:
        self.config = config

    def __call__(self, decision: Decision) -> Tensor:
        score_AW = decision.spread(decision.score_N, -torch.inf)
        return unmask_select(
            score_AW,
            decision.selectable_AW,
            self.config.rule,
            quota=decision.quota_A,
            bound=self.config.bound,
            uncertainty=-score_AW if self.config.rule in ENTROPY_RULES else None,
            rng=decision.rng,
        )


def score_of(stats: TokenStats, config: SamplerConfig, eos_ids: Tensor) -> Tensor:
    """[N], what ranks the drawn tokens: ``rollout.confidence`` and ``forbid_eos_confidence``."""
    by_entropy = config.confidence == "entropy" or config.rule in ENTROPY_RULES
    if by_entropy:
        score_N = -stats.entropy
    elif config.confidence == "margin":
        score_N = stats.margin
    else:
        score_N = stats.confidence
    if config.forbid_eos_confidence:
        is_eos_N = torch.isin(stats.token, eos_ids)
        score_N = score_N.masked_fill(is_eos_N, _LOWEST_ENTROPY_SCORE if by_entropy else 0.0)
    return score_N


def check_finite(numbers: Tensor) -> None:
    """Statistics of drawn tokens must be numbers."""
    if bool(numbers.isnan().any()):
        raise ValueError(
            "the network's logits are not finite, so there is no token to draw; check the weights "
            "and the precision"
        )
