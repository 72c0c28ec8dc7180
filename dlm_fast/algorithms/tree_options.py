"""The options that TreePO and GRPO share, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dlm_fast.algorithms.clipped_loss import KL
from dlm_fast.algorithms.options import check_choices, check_mini_batch, check_positive, check_range
from dlm_fast.algorithms.tree_advantages import AdvantageOptions
from dlm_fast.algorithms.tree_tokens import TreeAgg


@dataclass(frozen=True, kw_only=True)
class TreePolicyOptions(AdvantageOptions):
    """Clipped policy gradient on rollouts that share prefixes."""

    clip_low: float = 0.2
    """ratios below 1 - clip_low give no gradient where the advantage is negative"""
    clip_high: float = 0.28
    """ratios above 1 + clip_high give no gradient where the advantage is positive"""
    dual_clip: float = 10.0
    """ratios above it give no gradient where the advantage is negative either; inf: off"""
    loss_agg: TreeAgg = "token_mean"
    """token_mean: over all response tokens of an optimizer step. seq_mean_len: over the tokens of
    each response, then over responses"""
    kl: KL = "k3"
    """estimate of the divergence"""
    kl_weight: float = 0.0
    """beta; 0: no such term"""
    kl_to: Literal["old", "reference"] = "old"
    """the policy of the iteration's start, or that of the run's start, which needs adapters
    (lora.rank): they are switched off for it"""
    entropy_weight: float = 0.0
    """the entropy of each target's distribution is added to the objective with this weight"""
    old_logprob: Literal["recompute", "rollout"] = "recompute"
    """recompute: in the training layout, before the first step. rollout: as recorded while
    decoding; ``tree/mismatch`` says how far they are apart"""
    overlong_window: int = 0
    """rewards fall linearly over the last so many tokens before the longest possible response, by 1
    at its end (the paper takes 512); 0: as scored"""
    reject: Literal["none", "correct", "reward"] = "correct"
    """trees whose leaves are all correct or all wrong (correct), or all of one reward, are left out
    (a tree of one leaf stays); none: all are kept"""
    max_gen_batches: int = 1
    """batches of rollouts of an iteration: prompts whose trees are rejected get fresh ones, up to
    so many in all (the paper takes 2, its launch 10)"""
    max_skipped: int = 10
    """iterations in a row without a tree to train on before the run stops with an error"""
    epochs: int = 1
    """passes over the rollouts of an iteration"""
    mini_batch: int | None = None
    """rollouts per optimizer step, over all processes, whole trees; None: all"""
    score_temperature: float = 1.0
    """logits are divided by it when tokens are scored; take rollout.temperature to score the
    distribution that was drawn from"""
    rows_per_forward: int = 8192
    """packed tokens of a forward; larger trees are cut at nodes, a single path may need more.
    Changes memory and time, not the result"""

    @property
    def group_size(self) -> int:
        """Rollouts per prompt."""
        raise NotImplementedError

    @property
    def max_depth(self) -> int:
        """Most segments of a path."""
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_positive(
            self, "max_gen_batches", "max_skipped", "epochs", "rows_per_forward", "group_size"
        )
        check_range(self, 0, 1, "clip_low")
        numbers = ("clip_high", "kl_weight", "entropy_weight", "overlong_window")
        check_range(self, 0, math.inf, *numbers)
        check_range(self, 1e-6, math.inf, "score_temperature")
        check_mini_batch(self.mini_batch, self.group_size)
        if not self.dual_clip > 1 + self.clip_high:
            raise ValueError(
                f"algorithm.dual_clip={self.dual_clip} must be above 1 + clip_high="
                f"{1 + self.clip_high:g}; inf switches it off"
            )
        if self.old_logprob == "rollout" and self.score_temperature != 1:
            raise ValueError(
                "algorithm.old_logprob=rollout takes log-probabilities recorded at temperature 1; "
                f"algorithm.score_temperature={self.score_temperature} needs old_logprob=recompute"
            )
