"""A finished tree of rollouts: its nodes, its leaves in the order they ended, and what it saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlm_fast.rollout.path_nodes import PathNode
from dlm_fast.rollout.trajectory import Trajectory
from dlm_fast.rollout.tree_rules import Reason


@dataclass(frozen=True, kw_only=True, eq=False)
class Leaf:
    """A finished path."""

    node: PathNode
    reason: Reason
    is_fallback: bool
    """it went on from a path that had finished"""
    step: int
    """which of the tree's looks at ended segments it ended with"""


@dataclass(kw_only=True, eq=False)
class RolloutTree:
    """One prompt and its responses. Source: TreePO, arXiv 2508.17445."""

    prompt_ids: Tensor
    """int64 [P]"""
    root: PathNode
    """holds the prompt"""
    leaves: list[Leaf] = field(default_factory=list)
    """in the order they ended"""
    sequence_id: int = 0
    """names the tree's random numbers"""
    dropped: int = 0
    """paths that ended too short and were replaced"""
    fallbacks: int = 0
    """times that finished paths were continued"""
    pages_peak: int = 0
    """most pages of keys in use at once, by all trees of its call; 0: no keys were kept"""

    @property
    def flat_tokens(self) -> int:
        """Response tokens, a shared one once for each leaf (S)."""
        return sum(self.response_length(leaf) for leaf in self.leaves)

    @property
    def unique_tokens(self) -> int:
        """Response tokens, each once (U)."""
        return sum(len(node.tokens) for node in self.root.below() if node is not self.root)

    def response_length(self, leaf: Leaf) -> int:
        """Tokens of one response."""
        return leaf.node.stop - self.root.stop

    def numbers(self) -> Mapping[int, int]:
        """id(node) -> its number below the prompt; parents before children."""
        nodes = (node for node in self.root.below() if node is not self.root)
        return {id(node): number for number, node in enumerate(nodes)}

    def trajectories(
        self, *, seed: int, block_size: int, record_confidence: bool = False, first_number: int = 0
    ) -> list[Trajectory]:
        """The leaves as rollouts. ``first_number``: number of the first node, where a group has
        more trees than one."""
        numbers = self.numbers()
        made = []
        for leaf in self.leaves:
            path = leaf.node.path()[1:]
            values = {
                name: [value for node in path for value in getattr(node, name)] + extra
                for name, extra in (
                    ("logprobs", leaf.node.tail_logprobs),
                    ("confidences", leaf.node.tail_confidences),
                    ("steps", leaf.node.tail_steps),
                )
            }
            made.append(
                Trajectory(
                    prompt_ids=self.prompt_ids.clone(),
                    response_ids=torch.tensor([t for node in path for t in node.tokens]),
                    tail_ids=torch.tensor(leaf.node.tail, dtype=torch.int64),
                    step_map=torch.tensor(values["steps"], dtype=torch.int32),
                    logp_rollout=torch.tensor(values["logprobs"], dtype=torch.float32),
                    confidence=(
                        torch.tensor(values["confidences"], dtype=torch.float32)
                        if record_confidence
                        else None
                    ),
                    node_path=tuple(first_number + numbers[id(node)] for node in path),
                    node_lengths=tuple(len(node.tokens) for node in path),
                    sequence_id=leaf.node.key,
                    seed=seed,
                    block_size=block_size,
                    finish_reason=_finish_reason(leaf),
                    num_forwards=leaf.node.step,
                    detail={"tree": self._facts(leaf, path)},
                )
            )
        return made

    def _facts(self, leaf: Leaf, path: list[PathNode]) -> dict[str, Any]:
        return {
            "reason": leaf.reason.name.lower(),
            "fallback": leaf.is_fallback,
            "copies": [len(node.children) for node in (self.root, *path[:-1])],
            "step": leaf.step,
        }


def _finish_reason(leaf: Leaf) -> str:
    if leaf.node.is_stopped:
        return "eos"
    limited = (Reason.MAX_TOKENS, Reason.MAX_DEPTH, Reason.UNFINISHED)
    return "length" if leaf.reason in limited else "stop"
