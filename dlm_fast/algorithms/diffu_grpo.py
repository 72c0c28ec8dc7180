"""diffu-GRPO: token ratios from one state, the response masked and some of the prompt with it.

    log p(o_k | q)  from [q with tokens masked at rate ``prompt_mask``; mask, mask, ...]
    rho_k = exp(log p - log p_old), clipped token by token;  A = r - mean r;  KL to the start

Each pass over the rollouts hides other prompt tokens, the same under the present, the old and the
first weights. One draw per prompt and pass, so that its rollouts share a forward (the released code
draws one for each rollout). Source: d1, arXiv 2504.12216, section 3.2 and its released code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dlm_fast.algorithms.contract import Context
from dlm_fast.algorithms.group_ratio import RatioLevel, SequenceAgg
from dlm_fast.algorithms.mean_field_grpo import MeanFieldGRPO
from dlm_fast.algorithms.mean_field_options import MeanFieldOptions
from dlm_fast.algorithms.options import check_range
from dlm_fast.ops import Rng, Stream, mix64, philox_uniform
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group


@dataclass(frozen=True, kw_only=True)
class Config(MeanFieldOptions):
    """diffu-GRPO: token ratios from one state, some of the prompt masked."""

    group_size: int = 6
    """rollouts per prompt"""
    prompt_mask: float = 0.15
    """rate at which prompt tokens are masked"""
    ratio_level: RatioLevel = "token"
    """ratios of tokens (as published) or of whole responses"""
    loss_agg: SequenceAgg = "token_mean"
    """token_mean: over all tokens of an optimizer step. seq_mean: over the tokens of a response,
    then over responses"""
    clip_low: float = 0.5
    """ratios below 1 - clip_low give no gradient where the advantage is negative"""
    clip_high: float = 0.5
    """ratios above 1 + clip_high give no gradient where the advantage is positive"""
    kl_weight: float = 0.04
    """beta, weight of the divergence (k3) from the model at the run's start; 0: no reference"""
    epochs: int = 12
    """mu, passes over the rollouts of an iteration, each with prompt masks of its own"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, 1, "prompt_mask")

    def build(
        self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> DiffuGRPO:
        """The algorithm for one run."""
        return DiffuGRPO(self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed)


class DiffuGRPO(MeanFieldGRPO):
    """See the module's text. ``modules`` comes first: the policy's family shapes the requests."""

    config: Config

    @property
    def different_epochs(self) -> int:
        return self.config.epochs if self.config.prompt_mask else 1

    def hidden_prompt(self, group: Group, context: Context, epoch: int) -> Tensor:
        name = group.trajectories[0].group_id
        rng = Rng.of(mix64(self.seed, context.iteration, epoch), Stream.MASK, [name])
        return philox_uniform(rng, len(group.prompt_ids))[0] < self.config.prompt_mask
