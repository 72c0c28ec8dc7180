"""GRPO and RLOO: every rollout drawn on its own and compared with the prompt's others.

    grpo   A_i = (R_i - mean R) / (std R + 1e-6)      rloo   A_i = R_i - mean of the other rewards

Loss, packing and options are TreePO's (``treepo``), whose tree here is a star: the prompt, shared
by its rollouts, and one node for each. So the two algorithms differ in sampling and advantages, and
in nothing else.

Sources: GRPO, arXiv 2402.03300; RLOO, arXiv 2402.14740; clip-higher, token mean, rejection and the
overlong penalty: DAPO, arXiv 2503.14476.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlm_fast.algorithms.tree_advantages import Estimator
from dlm_fast.algorithms.tree_options import TreePolicyOptions
from dlm_fast.algorithms.treepo import TreePO
from dlm_fast.rollout.sampler_config import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Config(TreePolicyOptions):
    """GRPO and RLOO on causal and block models."""

    group_size: int = 16
    """rollouts per prompt"""
    estimator: Estimator = "grpo"
    """grpo: over the group's standard deviation. rloo: less the mean of the others. rfpp: less the
    mean, standardised over all response tokens. The others are TreePO's; without trees, mean and
    size are as rfpp"""

    def build(self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int) -> TreePO:
        """The algorithm for one run."""
        return TreePO(self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id)
