"""Which optimizer step of an epoch a rollout belongs to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MiniBatches:
    """The prompts of an iteration, shared out to optimizer steps in whole groups.

    By the prompt's place in the iteration, so the steps are the same on any layout of ranks.
    """

    num_prompts: int
    """of an iteration, over all ranks"""
    group_size: int
    """rollouts per prompt"""
    mini_batch: int | None
    """rollouts per optimizer step, over all ranks; None: all"""

    @property
    def num_updates(self) -> int:
        """Optimizer steps of an epoch."""
        rollouts = self.num_prompts * self.group_size
        return -(-rollouts // (self.mini_batch or rollouts))

    def update_of(self, group_id: int) -> int:
        """The step, from 0, of the rollouts of a group (``Trajectory.group_id``)."""
        return group_id % self.num_prompts * self.num_updates // self.num_prompts
