"""The options of IGPO, their checks, and the two published settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from dlm_fast.algorithms.advantages import Baseline
from dlm_fast.algorithms.group_ratio import RatioLevel, RatioMask, SequenceAgg
from dlm_fast.algorithms.options import (
    check_choices,
    check_mini_batch,
    check_positive,
    check_range,
)

IGPO_RELEASE: dict[str, Any] = {
    "count_round": "ceil",
    "placement": "stretch",
    "ratio_level": "sequence",
    "ratio_mask": "all",
    "loss_agg": "token_mean",
    "scored_tokens": "all",
    "cut_answer": False,
    "reveal_last_chunk": True,
}
"""what the released code does where it differs from the paper; ``Config(**IGPO_RELEASE)``"""


@dataclass(frozen=True, kw_only=True)
class IgpoOptions:
    """IGPO: where all rollouts of a prompt fail, some are decoded again around hints."""

    group_size: int = 8
    """rollouts per prompt"""
    guidance: Literal["inpaint", "resample", "none"] = "inpaint"
    """for prompts that no rollout solved. inpaint: decode again around pieces of a reference
    solution. resample: decode again without them (GRPO with as many samples). none: GRPO"""
    eta_low: float = 0.2
    """smallest share of a solution's chunks that a rollout is given"""
    eta_high: float = 0.6
    """largest share"""
    chunk_min: int = 5
    """shortest chunk of a solution, in tokens"""
    chunk_max: int = 10
    """longest chunk, in tokens"""
    tail: int = 30
    """tokens at the end of the window that stay free for the answer"""
    placement: Literal["stretch", "inplace"] = "stretch"
    """where chunks stand: spread over the window (the released code), or where the solution has
    them (the paper)"""
    count_round: Literal["floor", "ceil"] = "floor"
    """rounding of the number of chunks: as in the paper, or up"""
    segment_per: Literal["rollout", "prompt"] = "rollout"
    """whether each rollout has the solution cut in its own way (the released code)"""
    reveal_last_chunk: bool = False
    """the solution's last chunk is always given; it may hold the answer"""
    cut_answer: bool = True
    """leave the final answer out of the solution"""
    max_replaced: float = 0.5
    """lambda, largest share of a group that right inpainted rollouts replace"""
    replace: Literal["first", "lowest"] = "first"
    """which members are replaced: the first, or those with the lowest rewards"""
    hint_keep: float = 0.2
    """tau, share of the hint tokens that enter the loss: those of largest entropy"""
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
        check_positive(
            self, "group_size", "chunk_min", "chunk_max", "epochs", "prompts_per_forward"
        )
        if self.group_size < 2:
            raise ValueError(
                "algorithm.group_size must be at least 2, since advantages compare rollouts of a "
                f"prompt; got {self.group_size}"
            )
        check_range(self, 0, 1, "eta_high", "clip_low")
        check_range(self, 0, self.eta_high, "eta_low")
        check_range(self, 0, math.inf, "tail", "clip_high", "kl_weight")
        check_range(self, 1e-9, 1, "max_replaced", "hint_keep")
        if self.chunk_min > self.chunk_max:
            raise ValueError(
                f"algorithm.chunk_min={self.chunk_min} must not exceed algorithm.chunk_max="
                f"{self.chunk_max}"
            )
        if self.guidance != "none" and self.most_replaced == 0:
            raise ValueError(
                f"algorithm.max_replaced={self.max_replaced} of {self.group_size} rollouts is "
                f"none; raise it to {1 / self.group_size:g} at least, or set "
                "algorithm.guidance=none"
            )
        check_mini_batch(self.mini_batch, self.group_size)

    @property
    def most_replaced(self) -> int:
        """Members of a group that may be replaced."""
        return int(self.max_replaced * self.group_size + 1e-9)
