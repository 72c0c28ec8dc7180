"""Supervised fine-tuning of a masked diffusion language model on demonstrations.

    loss = -(1/N) sum over demonstrations of (1/n) sum_j (1/t_j) sum over i in S_j of
            log p(y_i | q, y with the positions of S_j masked),     t_j ~ U(0, 1], P(i in S_j) = t_j

Sources: LLaDA, arXiv 2502.09992 (loss); d1, arXiv 2504.12216 (division by the number of tokens).

    q, y     prompt, demonstration     the prompt is never masked
    n        num_samples               masks per demonstration and step
    N        micro.divisor             response tokens of the batch, over all ranks
    1/t_j    copies.weight_K           L/|S| and the like with other samplers: the same expectation

Shapes: K masked copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlm_fast.algorithms.contract import (
    Algorithm,
    Context,
    Metrics,
    SamplingPlan,
    TrainedModule,
    Update,
)
from dlm_fast.algorithms.elbo import Masking, Micro, Sampler, micro_batches
from dlm_fast.algorithms.options import check_choices, check_pairs, check_positive
from dlm_fast.algorithms.scorer import Scorer
from dlm_fast.ops import mix64
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory, trajectories_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """SFT: masked-diffusion loss on the task's own demonstrations."""

    num_samples: int = 1
    """Monte Carlo masks per demonstration"""
    sampler: Sampler = "bern_t"
    """how masks are drawn. bern_t: each token with probability t, as published. l_strat and the
    others as for bgpo: the same loss in expectation (quad_t nearly), with less noise"""
    samples_per_forward: int = 4
    """masks of a demonstration per forward; changes memory and time, not the result"""
    fill_to: int = 0
    """tokens up to which a shorter demonstration is filled with the end-of-text token, which is
    scored too; 0: one end-of-text token"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "num_samples", "samples_per_forward")
        check_pairs(self.sampler, self.num_samples)
        if self.fill_to < 0:
            raise ValueError(f"algorithm.fill_to must be 0 or more, got {self.fill_to}")

    def build(self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int) -> SFT:
        """The algorithm for one run."""
        return SFT(self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstration:
    """A response to imitate."""

    trajectory: Trajectory
    length: int
    """scored tokens"""


class SFT(Algorithm):
    """See the module's text. ``modules`` comes first: the policy's family shapes the requests."""

    def __init__(
        self, config: Config, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> None:
        self.config = config
        self.num_prompts = num_prompts
        self.mask_id = mask_id
        self.seed = seed
        self.scorer = Scorer(mask_id=mask_id)

    def loss(self, micro: Micro, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """-(1/(N n)) * sum of ell over the micro-batch."""
        copies = micro.draw()
        weight_K = torch.full_like(copies.weight_K, -1 / (micro.divisor * self.config.num_samples))
        loss, ell_K = self.scorer.weighted_ell(copies, weight_K, forward)
        tokens = micro.count * sum(demonstration.length for demonstration in micro.records)
        return loss, {"elbo/per_token": (ell_K.sum().item(), float(tokens))}

    def modules(self, policy: nn.Module) -> dict[str, TrainedModule]:
        self.scorer.bind(policy)
        return super().modules(policy)

    def sampling(self, iteration: int) -> SamplingPlan:
        return SamplingPlan(num_prompts=self.num_prompts, sampler=None, fill_to=self.config.fill_to)

    def prepare(self, groups: list[Group], context: Context) -> list[Micro]:
        """All samples of all demonstrations, one optimizer step."""
        masking = Masking(
            mask_id=self.mask_id,
            seed=mix64(self.seed, context.iteration),
            sampler=self.config.sampler,
            num_samples=self.config.num_samples,
        )
        demonstrations = [
            Demonstration(trajectory=trajectory, length=masking.num_scored(trajectory))
            for trajectory in trajectories_of(groups)
        ]
        demonstrations = [d for d in demonstrations if d.length > 0]
        tokens = context.global_sum(float(sum(d.length for d in demonstrations)))
        return list(
            micro_batches(
                demonstrations,
                masking,
                divisor=max(1.0, tokens),
                max_records=context.micro_batch,
                max_samples=self.config.samples_per_forward,
                device=context.device,
            )
        )

    def updates(self, samples: list[Micro], context: Context) -> Iterator[Update]:
        yield Update(micros=samples)
