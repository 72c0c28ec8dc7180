"""The options of IGPO, their checks, and the two published settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from dlm_fast.algorithms.mean_field_options import MeanFieldOptions
from dlm_fast.algorithms.options import check_positive, check_range

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
class IgpoOptions(MeanFieldOptions):
    """IGPO: where all rollouts of a prompt fail, some are decoded again around hints."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "chunk_min", "chunk_max")
        check_range(self, 0, 1, "eta_high")
        check_range(self, 0, self.eta_high, "eta_low")
        check_range(self, 0, math.inf, "tail")
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

    @property
    def most_replaced(self) -> int:
        """Members of a group that may be replaced."""
        return int(self.max_replaced * self.group_size + 1e-9)
