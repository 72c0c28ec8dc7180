"""Options of low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlm_fast.config import from_dict

LINEAR_LAYERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters on a frozen model (extra lora). Source: LoRA, arXiv 2106.09685."""

    rank: int = 0
    """columns of each adapter; 0: no adapters, all weights are trained"""
    alpha: float | None = None
    """adapters are scaled by alpha / rank; none: 2 * rank"""
    targets: tuple[str, ...] = LINEAR_LAYERS
    """linear layers that get an adapter, by the last part of their name"""
    seed: int = 0
    """of the initial weights"""
    adapter: str | None = None
    """directory of saved adapters (peft's format) to start from, with their rank, alpha, targets"""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise ValueError(f"lora.rank must be 0 (no adapters) or more, got {self.rank!r}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be above 0, got {self.alpha!r}")
        if not self.targets:
            raise ValueError("lora.targets is empty; name at least one linear layer, as in q_proj")
        if self.adapter is not None and (
            self.rank or self.alpha is not None or self.targets != LINEAR_LAYERS
        ):
            raise ValueError(
                f"lora.adapter={self.adapter} brings its own rank, alpha and targets; leave "
                "lora.rank, lora.alpha and lora.targets out"
            )

    @property
    def enabled(self) -> bool:
        """There are adapters."""
        return self.rank > 0 or self.adapter is not None

    @property
    def scaled_alpha(self) -> float:
        """``alpha``, or what stands for it."""
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)


def lora_options(given: LoraOptions | Mapping[str, Any] | None) -> LoraOptions:
    """Options from a mapping, as config files hold them; none: no adapters."""
    if given is None:
        return LoraOptions()
    if isinstance(given, LoraOptions):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"lora must be LoraOptions or a mapping of its options, got {given!r}")
    return from_dict(given, LoraOptions, path="lora")
