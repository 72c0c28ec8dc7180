"""What a caller may ask of one forward pass of a Policy, and the answer to a score.

N selected rows, T packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dlm_fast.ops import Rng


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Log-probabilities of target tokens, differentiable: the training path."""

    rows: Tensor
    """int32 [N], predicting rows of the flattened input (``Policy.predicting_rows``)"""
    targets: Tensor
    """int64 [N], -100 leaves a row out; [N, G]: several tokens of each row, which share one sweep
    over the vocabulary"""
    weights: Tensor | None = None
    """[N], constants: ask for sum(weights * logprob) alone, whose gradient costs no second pass"""
    temperature: float = 1.0
    """logits are divided by it"""
    forbid_ids: Sequence[int] = ()
    """tokens left out of the distribution"""
    in_loss: bool = False
    """with ``weights``: the loss is this objective, or a sum of such, plus terms that do not touch
    the head; so the head's gradient may be added to a main gradient as soon as it is known"""


class ScoreOutput(NamedTuple):
    """A tuple, because data-parallel wrappers look for tensors in tuples only."""

    logprob: Tensor
    """[N] or [N, G] like the targets; detached when weights were given"""
    lse: Tensor | None
    """[N]; None when weights were given"""
    entropy: Tensor | None
    """[N], nats; None when weights were given"""
    objective: Tensor | None
    """scalar sum(weights * logprob), differentiable; None without weights"""


@dataclass(frozen=True, kw_only=True, eq=False)
class StatsRequest:
    """Sampled tokens and their statistics, without gradient: the sampling path."""

    rows: Tensor
    """int32 [N], predicting rows of the flattened input"""
    targets: Tensor | None = None
    """int64 [N], tokens whose log-probability is wanted instead of the sampled token's"""
    temperature: float = 0.0
    """of the draw; 0 takes the most likely token"""
    top_k: int = 0
    """draw from the k most likely tokens; 0: from all"""
    top_p: float = 1.0
    """draw from the smallest set of tokens with at least this probability"""
    forbid_ids: Sequence[int] = ()
    """tokens left out of the distribution"""
    rng: Rng | None = None
    """needed when the temperature is above 0"""


@dataclass(frozen=True)
class LogitsRequest:
    """All logits, for people and small models."""
