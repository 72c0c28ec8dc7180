"""The options of TraceRL and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dlm_fast.algorithms.advantages import Baseline
from dlm_fast.algorithms.clipped_loss import KL, LossAgg
from dlm_fast.algorithms.options import (
    check_choices,
    check_mini_batch,
    check_positive,
    check_range,
)
from dlm_fast.algorithms.schedule import parse_schedule
from dlm_fast.algorithms.trace_rows import Estimator


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """TraceRL: every token is scored in the state in which it was revealed."""

    group_size: int = 8
    """rollouts per prompt"""
    shrink: int = 1
    """neighbouring steps that are merged: inside each block for block models, over the whole
    response for full-attention ones, which need a pass per merged step (the paper takes 8)"""
    estimator: Estimator = "trace"
    """trace: the states of the rollout. random_masking, coupled: drawn masks instead, the baselines
    of the paper; coupled draws pairs of a mask and its complement"""
    num_masks: int = 1
    """drawn masks per response, for the estimators random_masking and coupled (coupled: even)"""
    mask_low: float = 0.1
    """lowest rate of drawn masks"""
    mask_high: float = 0.9
    """highest rate of drawn masks"""
    clip_low: float = 0.2
    """ratios below 1 - clip_low give no gradient where the advantage is negative"""
    clip_high: float = 0.2
    """ratios above 1 + clip_high give no gradient where the advantage is positive"""
    kl: KL = "k3"
    """estimate of the divergence from the policy of the iteration's start. k1 pushes every token
    with the same force, however far it has moved"""
    kl_weight: float = 0.01
    """beta; 0: no such term"""
    loss_agg: LossAgg = "token_mean"
    """how the tokens' terms are averaged. token_mean: over all of an optimizer step. step_mean:
    over each step's tokens, summed over steps (the paper). seq_mean_len: over each response.
    slice_mean, slice_len: as trainers with one pass per slice do; slice_len divides by
    rollout.max_new_tokens"""
    old_logprob: Literal["recompute", "rollout", "decoupled"] = "recompute"
    """recompute: in the training layout, before the first step. rollout: as recorded while
    decoding. decoupled: recomputed, weighted with how far the rollout was from it (at most
    ``decoupled_cap``)"""
    decoupled_cap: float = 2.0
    """largest importance weight of ``decoupled``"""
    advantage: Baseline = "zscore"
    """reward less the group's mean, over its population standard deviation (zscore) or the unbiased
    one (std), undivided (mean), less the mean of the others (leave_one_out), bare (none)"""
    overlong: int = 0
    """responses that come within so many tokens of the longest possible count as wrong, with reward
    0, before groups are compared (TraceRL's trainer takes 5 for mathematics); 0: as scored"""
    drop_below: float = 0.0
    """groups with a smaller share of correct rollouts are left out"""
    drop_above: float = 1.0
    """groups with a larger share of correct rollouts are left out"""
    epochs: int = 1
    """passes over the rollouts of an iteration"""
    mini_batch: int | None = None
    """rollouts per optimizer step, over all processes, a multiple of group_size; None: all"""
    num_pads: int = 0
    """targets behind the first end of text; 0 can leave a model that never stops"""
    score_temperature: float = 1.0
    """logits are divided by it when tokens are scored; take rollout.temperature to score the
    distribution that was drawn from"""
    rows_per_forward: int = 8192
    """packed tokens of a forward; a single response may need more. Changes memory and time, not the
    result"""
    value: Literal["none", "own", "shared"] = "none"
    """a value model, for step-level advantages. own: with a backbone of its own, a copy of the
    policy's. shared: a head on the policy's hidden states, which costs a pass without gradient and
    leaves the backbone to the policy"""
    gamma: float = 1.0
    """discount per step, with a value model or token rewards"""
    lam: float = 1.0
    """lambda of the generalised advantages, per step"""
    value_lr_scale: float = 5.0
    """learning rate of the value model relative to train.lr"""
    value_epochs: int = 1
    """passes of the value model over the rollouts of an iteration"""
    value_clip: float = 0.2
    """how far a value may move before its loss is the larger one"""
    value_pretraining: int = 0
    """first iterations that train the value model alone"""
    schedule: tuple[str, ...] = ()
    """phases of the run, such as "iterations=60,train_block_size=8" "iterations=40,block_size=8".
    Each may set iterations, block_size (decoded), train_block_size (a multiple of it), steps and
    max_new_tokens; the rest is as in rollout. The last phase goes on"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(
            self, "group_size", "shrink", "num_masks", "epochs", "rows_per_forward", "value_epochs"
        )
        check_range(self, 0, self.mask_high, "mask_low")
        check_range(self, 0, 1, "mask_high", "clip_low", "drop_above", "gamma", "lam")
        check_range(self, 0, self.drop_above, "drop_below")
        check_range(
            self,
            0,
            math.inf,
            "clip_high",
            "kl_weight",
            "num_pads",
            "overlong",
            "value_pretraining",
            "value_clip",
        )
        check_range(self, 1e-6, math.inf, "score_temperature", "decoupled_cap", "value_lr_scale")
        check_mini_batch(self.mini_batch, self.group_size)
        if self.estimator != "trace" and (self.shrink > 1 or self.old_logprob != "recompute"):
            raise ValueError(
                f"algorithm.estimator={self.estimator} has no steps to shrink and no log-"
                "probabilities of the rollout; set shrink=1 and old_logprob=recompute"
            )
        if self.estimator == "coupled" and self.num_masks % 2:
            raise ValueError(
                f"algorithm.estimator=coupled draws pairs, so algorithm.num_masks must be even; "
                f"got {self.num_masks}"
            )
        if self.old_logprob != "recompute" and self.score_temperature != 1:
            raise ValueError(
                f"algorithm.old_logprob={self.old_logprob} takes log-probabilities recorded at "
                f"temperature 1; algorithm.score_temperature={self.score_temperature} needs "
                "old_logprob=recompute"
            )
        if self.value_pretraining and self.value == "none":
            raise ValueError(
                "algorithm.value_pretraining needs a value model: algorithm.value=own or shared"
            )
        parse_schedule(self.schedule)
