"""What one rollout leaves behind: token ids, the order of their revelation, the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(kw_only=True, eq=False)
class Trajectory:
    """One rollout. Token ids are the ground truth; text is never tokenised again.

    Shapes: ``P`` prompt tokens, ``R`` response tokens, ``E`` tail tokens (decoded in the terminal
    block past the response). Tensors lie on the CPU and are never padded.
    Source: TraceRL, arXiv 2509.06949, record of the rollout.
    """

    prompt_ids: Tensor
    """int64 [P]"""
    response_ids: Tensor
    """int64 [R], final ids; an EOS that was produced stays"""
    tail_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [E]"""
    step_map: Tensor | None = None
    """int32 [R+E], 1-based step (forward of this row) at which each token was revealed; 0: not
    drawn (a given token, or end of text filled in after an early stop); None: not sampled (data)"""
    logp_rollout: Tensor | None = None
    """float32 [R+E], log-probability (temperature 1, full vocabulary) of each token as revealed"""
    confidence: Tensor | None = None
    """float32 [R+E], the confidence that the unmasking rule saw, if recorded"""
    hint_mask: Tensor | None = None
    """bool [R], True where a token was given, not sampled (IGPO)"""
    node_path: tuple[int, ...] = ()
    """nodes of its group's trees below the prompt, from the first segment to the leaf (TreePO);
    numbers grow from parent to child; empty for flat rollouts"""
    node_lengths: tuple[int, ...] = ()
    """response tokens of each node of ``node_path``; they add up to R"""
    actions: dict[str, Tensor] = field(default_factory=dict)
    """recorded inputs and actions of an unmasking policy"""
    task_id: int = 0
    """position of the example in its data set"""
    group_id: int = 0
    """rollouts of one prompt in one iteration share it"""
    member: int = 0
    """index inside the group"""
    sequence_id: int = 0
    """names the random numbers of this rollout"""
    policy_version: int = 0
    """optimizer steps taken by the policy that produced it"""
    seed: int = 0
    block_size: int = 0
    finish_reason: str = "length"
    """eos | length | stop | data"""
    num_forwards: int = 0
    """network evaluations this row took part in (NFE)"""
    text: str = ""
    """the completion as scored"""
    reward: float = float("nan")
    correct: bool = False
    detail: dict[str, Any] = field(default_factory=dict)
    """what the task's checker said"""

    @property
    def input_ids(self) -> Tensor:
        """int64 [P+R], prompt and response."""
        return torch.cat([self.prompt_ids, self.response_ids])

    @property
    def prompt_length(self) -> int:
        return int(self.prompt_ids.numel())

    @property
    def response_length(self) -> int:
        return int(self.response_ids.numel())


@dataclass(kw_only=True, eq=False)
class Group:
    """The rollouts of one prompt in one iteration."""

    task_id: int
    prompt_ids: Tensor
    """int64 [P]"""
    trajectories: list[Trajectory]
    example: dict[str, Any] = field(default_factory=dict)
    """the task's example"""
    trace: str = ""
    """the beginning of a right completion, where the plan asked for it and the task has one"""

    @property
    def rewards(self) -> Tensor:
        """float64 [G]"""
        return torch.tensor([t.reward for t in self.trajectories], dtype=torch.float64)


def trajectories_of(groups: Sequence[Group]) -> list[Trajectory]:
    """All rollouts of the groups, in order."""
    return [trajectory for group in groups for trajectory in group.trajectories]
