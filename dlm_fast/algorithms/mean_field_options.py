"""Options that GRPO, IGPO and diffu-GRPO share where one masked state scores all rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dlm_fast.algorithms.advantages import Baseline
from dlm_fast.algorithms.group_ratio import RatioLevel, RatioMask, SequenceAgg
from dlm_fast.algorithms.options import (
    check_choices,
    check_mini_batch,
    check_positive,
    check_range,
)


@dataclass(frozen=True, kw_only=True)
class MeanFieldOptions:
    """Policy optimisation from one masked state."""

    group_size: int = 8
    """rollouts per prompt"""
    scored_tokens: Literal["to_eos", "all"] = "to_eos"
    """tokens that enter the loss: up to the first end of text, or the whole window"""
    advantage: Baseline = "mean"
    """reward less the group's mean (mean), over its standard deviation (std, or zscore with the
    population's), less the mean of the others (leave_one_out), bare (none)"""
    ratio_level: RatioLevel = "sequence"
    """ratios of whole responses or of tokens"""
    ratio_mask: RatioMask = "kept"
    """tokens in the ratio of a response: those that enter the loss, or all of the window (the
    released code, where filtered tokens keep their gradient)"""
    loss_agg: SequenceAgg = "seq_mean"
    """seq_mean: over the tokens of a response, then over responses (the paper). token_mean: over
    all tokens of an optimizer step"""
    clip_low: float = 0.2
    """ratios below 1 - clip_low give no gradient where the advantage is negative"""
    clip_high: float = 0.2
    """ratios above 1 + clip_high give no gradient where the advantage is positive"""
    kl_weight: float = 0.01
    """beta, weight of the divergence (k3) from the model at the run's start; 0: no reference"""
    epochs: int = 4
    """mu, passes over the rollouts of an iteration"""
    mini_batch: int | None = None
    """rollouts per optimizer step, over all processes, a multiple of group_size; None: all"""
    prompts_per_forward: int = 4
    """prompts in one forward of the loss, each with all its rollouts; changes memory and time, not
    the result"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "group_size", "epochs", "prompts_per_forward")
        if self.group_size < 2:
            raise ValueError(
                "algorithm.group_size must be at least 2, since advantages compare rollouts of a "
                f"prompt; got {self.group_size}"
            )
        check_range(self, 0, 1, "clip_low")
        check_range(self, 0, math.inf, "clip_high", "kl_weight")
        check_mini_batch(self.mini_batch, self.group_size)
