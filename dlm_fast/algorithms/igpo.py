"""IGPO: policy optimisation of diffusion models with inpainted rollouts where all others failed.

    where no rollout of a prompt is right, decode again around pieces of a reference solution;
    at most ``max_replaced`` of the group give their places to right ones (``inpainting``)
    A_i  = r_i - mean r
    d_ik = log p(o_ik | q) - log p_old(o_ik | q)         from one state: all of the response masked
    rho  = exp(mean of d over the kept tokens)           kept: generated tokens, and the hint tokens
                                                         of largest entropy
    J    = mean over responses of the mean over kept tokens of
                min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL(ref)

Source: IGPO, arXiv 2509.10396, equations 4 to 8, and its released code. The state does not depend
on the response, so a prompt's rollouts share one forward (``mean_field``): ours.

Symbols: o_ik token k of rollout i; ``kept`` ``Windows.keep``; eps ``clip_low``, ``clip_high``;
beta ``kl_weight``; G ``group_size``; mu ``epochs``.

Letters: ``L`` positions of the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from dlm_fast.algorithms.contract import Context, Metrics, Resample, SamplingPlan
from dlm_fast.algorithms.group_ratio import kept_hints
from dlm_fast.algorithms.igpo_options import IgpoOptions
from dlm_fast.algorithms.inpainting import Inpainting
from dlm_fast.algorithms.mean_field_grpo import MeanFieldGRPO, Windows
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group


@dataclass(frozen=True, kw_only=True)
class Config(IgpoOptions):
    """IGPO: where all rollouts of a prompt fail, some are decoded again around hints."""

    def build(self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int) -> IGPO:
        """The algorithm for one run."""
        return IGPO(self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed)


class IGPO(MeanFieldGRPO):
    """See the module's text. ``modules`` comes first: the policy's family shapes the requests."""

    config: Config

    def __init__(
        self, config: Config, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> None:
        super().__init__(
            config, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed
        )
        self.inpainting = Inpainting(
            config, window=rollout.max_new_tokens, mask_id=mask_id, seed=seed
        )
        self.inpainting.never_drawn = rollout.forbid_ids
        self._refined: Metrics = {}

    def sampling(self, iteration: int) -> SamplingPlan:
        return replace(super().sampling(iteration), traces=self.config.guidance == "inpaint")

    def refine(self, groups: list[Group], resample: Resample) -> list[Group]:
        self._refined = self.inpainting.refine(groups, resample, self._policy)
        return groups

    def prepare(self, groups: list[Group], context: Context) -> list[list[list[Windows]]]:
        context.metrics |= self._refined
        return super().prepare(groups, context)

    def filtered_hints(self, entropy_L: Tensor, hint_L: Tensor) -> Tensor:
        return hint_L & ~kept_hints(entropy_L, hint_L, self.config.hint_keep)
