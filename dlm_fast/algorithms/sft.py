"""Supervised fine-tuning on demonstrations: the published masked-diffusion loss, and its variants.

``variant=elbo``, as published:

    loss = -(1/N) sum over demonstrations of (1/n) sum_j (1/t_j) sum over i in S_j of
            log p(y_i | q, y with the positions of S_j masked),     t_j ~ U(0, 1], P(i in S_j) = t_j

Other variants choose the states s in which tokens are predicted, and weigh no token more:

    loss = -(1/N) sum over demonstrations of (1/n) sum over s, i in targets(s) of log p(y_i | q, s)

    random_masking   S_j at a rate in [low, high]; s: the rest of y
    semi_ar          S_j at such a rate in each block; s: earlier blocks, the rest of y_i's own
    trace            s: what the model itself would have revealed before y_i (``sft_trace``)
    ar               s: the tokens before y_i, under causal attention

Sources: LLaDA, arXiv 2502.09992 (loss); d1, arXiv 2504.12216 (division by the number of tokens);
TraceRL, arXiv 2509.06949 (variants).

    q, y     prompt, demonstration     the prompt is never masked
    n        num_samples               masks per demonstration and step; 1 for trace and ar
    N        divisor                   response tokens of the batch, over all ranks
    1/t_j    copies.weight_K           L/|S| and the like with other samplers: the same expectation

Shapes: K masked copies, U targets of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

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
from dlm_fast.algorithms.options import check_choices, check_pairs, check_positive, check_range
from dlm_fast.algorithms.scorer import Scorer
from dlm_fast.algorithms.sft_states import (
    demonstrated,
    one_block_at_a_time,
    recorded,
    rows_of_causal,
    text_length,
)
from dlm_fast.algorithms.sft_trace import collect_traces
from dlm_fast.algorithms.trace_rows import TargetRows, Traced, randomly_masked
from dlm_fast.algorithms.trace_tokens import Layout, row_counts
from dlm_fast.models.requests import ScoreRequest, StatsRequest
from dlm_fast.ops import mix64
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory, trajectories_of

Variant = Literal["elbo", "random_masking", "semi_ar", "trace", "ar"]

OPTIONS_OF: dict[str, tuple[Variant, ...]] = {
    "sampler": ("elbo",),
    "num_samples": ("elbo", "random_masking", "semi_ar"),
    "mask_low": ("random_masking", "semi_ar"),
    "mask_high": ("random_masking", "semi_ar"),
    "shrink": ("trace",),
    "tokens_per_step": ("trace",),
    "num_pads": ("random_masking", "semi_ar", "trace", "ar"),
}
"""options that mean something to some variants only"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """SFT: masked-diffusion loss on the task's own demonstrations."""

    variant: Variant = "elbo"
    """in which states tokens are predicted. elbo: random masks weighted by 1/t, as published.
    random_masking: random masks at a rate between mask_low and mask_high, unweighted. semi_ar: one
    such rate per block, earlier blocks known. trace: the order in which the model itself would
    reveal the tokens. ar: next tokens under causal attention. elbo and random_masking need full
    attention, semi_ar and trace any diffusion model, ar a causal model or one with a logit shift"""
    num_samples: int = 1
    """Monte Carlo masks per demonstration"""
    sampler: Sampler = "bern_t"
    """how masks of variant elbo are drawn. bern_t: each token with probability t, as published.
    l_strat and the others as for bgpo: the same loss in expectation (quad_t nearly), with less
    noise"""
    samples_per_forward: int = 4
    """masks of a demonstration per forward of variant elbo; changes memory and time, not the
    result"""
    rows_per_forward: int = 8192
    """packed tokens of a forward of the other variants; a single state may need more. Changes
    memory and time, not the result"""
    mask_low: float = 0.1
    """lowest rate of masking (random_masking, semi_ar)"""
    mask_high: float = 0.9
    """highest rate of masking (random_masking, semi_ar)"""
    tokens_per_step: int = 2
    """tokens of a block that each step of a collected trace reveals"""
    shrink: int = 1
    """neighbouring steps of a trace that are merged: inside each block for block models, over the
    whole response for others"""
    fill_to: int = 0
    """tokens up to which a shorter demonstration is filled with the end-of-text token, which is
    scored too; 0: one end-of-text token"""
    num_pads: int | None = None
    """targets behind the first end of text; what fill_to adds behind them stays masked. None: all
    that fill_to adds. Not for variant elbo"""
    length_curriculum: tuple[tuple[int, int], ...] = ()
    """pairs of (iterations, longest demonstration in tokens, its end of text included): longer ones
    are left out in these iterations. Behind the last pair none is"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(
            self,
            "num_samples",
            "samples_per_forward",
            "rows_per_forward",
            "tokens_per_step",
            "shrink",
        )
        check_pairs(self.sampler, self.num_samples)
        check_range(self, 0, 1, "mask_high")
        check_range(self, 0, self.mask_high, "mask_low")
        if self.mask_high == 0:
            raise ValueError("algorithm.mask_high=0 masks nothing; the rate must be above 0")
        if self.fill_to < 0:
            raise ValueError(f"algorithm.fill_to must be 0 or more, got {self.fill_to}")
        if self.num_pads is not None:
            check_range(self, 0, float("inf"), "num_pads")
        for name, variants in OPTIONS_OF.items():
            value = getattr(self, name)
            if self.variant not in variants and value != getattr(type(self), name):
                raise ValueError(
                    f"algorithm.{name}={value} has no meaning for algorithm.variant="
                    f"{self.variant}; leave it out or set the variant to {' or '.join(variants)}"
                )
        for phase in self.length_curriculum:
            if len(phase) != 2 or any(type(n) is not int or n < 1 for n in phase):
                raise ValueError(
                    "algorithm.length_curriculum holds pairs of positive integers, (iterations, "
                    f"longest demonstration in tokens), got {phase!r}"
                )

    def longest(self, iteration: int) -> int | None:
        """Tokens of the longest demonstration of an iteration (from 0); None: no limit."""
        for count, tokens in self.length_curriculum:
            if iteration < count:
                return tokens
            iteration -= count
        return None

    def build(self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int) -> SFT:
        """The algorithm for one run."""
        return SFT(self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstration:
    """A response to imitate."""

    trajectory: Trajectory
    length: int
    """scored tokens"""


@dataclass(frozen=True, kw_only=True, eq=False)
class States:
    """One forward pass over states of demonstrations."""

    rows: TargetRows
    divisor: float
    """N n"""


class SFT(Algorithm):
    """See the module's text. ``modules`` comes first: the policy's family shapes the requests."""

    def __init__(
        self, config: Config, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> None:
        self.config, self.rollout = config, rollout
        self.num_prompts = num_prompts
        self.mask_id = mask_id
        self.seed = seed
        self.scorer = Scorer(mask_id=mask_id)
        self._policy: Any = None

    def loss(self, micro: Micro, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """-(1/(N n)) * sum of ell over the micro-batch: variant elbo."""
        copies = micro.draw()
        weight_K = torch.full_like(copies.weight_K, -1 / (micro.divisor * self.config.num_samples))
        loss, ell_K = self.scorer.weighted_ell(copies, weight_K, forward)
        tokens = micro.count * sum(demonstration.length for demonstration in micro.records)
        return loss, {"elbo/per_token": (ell_K.sum().item(), float(tokens))}

    def cross_entropy(self, micro: States, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """-(1/(N n)) * sum of the targets' log-probabilities: the other variants."""
        rows = micro.rows
        weight_U = torch.full(rows.targets.shape, -1 / micro.divisor, dtype=torch.float64)
        request = ScoreRequest(
            rows=self._policy.predicting_rows(rows.rows, rows.visibility),
            targets=rows.targets,
            weights=weight_U.to(rows.targets.device),
            in_loss=True,
        )
        output = forward(rows.input_ids, rows.visibility, score=request)
        total = output.logprob.detach().double().sum().item()
        return output.objective, {"sft/logprob": (total, float(rows.targets.numel()))}

    def modules(self, policy: nn.Module) -> dict[str, TrainedModule]:
        bare: Any = policy
        _check_family(self.config.variant, bare.family)
        if self.config.variant == "elbo":
            self.scorer.bind(policy)
        self._policy = bare
        return super().modules(policy)

    def sampling(self, iteration: int) -> SamplingPlan:
        return SamplingPlan(num_prompts=self.num_prompts, sampler=None, fill_to=self.config.fill_to)

    def prepare(self, groups: list[Group], context: Context) -> list[Micro] | list[States]:
        """All states of all demonstrations, one optimizer step."""
        trajectories = self._short_enough(trajectories_of(groups), context)
        if self.config.variant != "elbo":
            return self._states(trajectories, context)
        masking = Masking(
            mask_id=self.mask_id,
            seed=mix64(self.seed, context.iteration),
            sampler=self.config.sampler,
            num_samples=self.config.num_samples,
        )
        demonstrations = [
            Demonstration(trajectory=trajectory, length=masking.num_scored(trajectory))
            for trajectory in trajectories
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

    def updates(self, samples: Any, context: Context) -> Iterator[Update]:
        yield Update(
            micros=samples, loss=None if self.config.variant == "elbo" else self.cross_entropy
        )

    def _short_enough(self, trajectories: list[Trajectory], context: Context) -> list[Trajectory]:
        """Those that the curriculum admits."""
        longest = self.config.longest(context.iteration)
        if longest is None:
            kept = trajectories
        else:
            eos_ids = self._policy.family.eos_ids
            kept = [t for t in trajectories if text_length(t, eos_ids) <= longest]
        if self.config.length_curriculum:
            left_out = float(len(trajectories) - len(kept))
            context.metrics["sft/left_out"] = (left_out, float(len(trajectories)))
        return kept

    def _states(self, trajectories: list[Trajectory], context: Context) -> list[States]:
        """The forward passes of every variant but elbo."""
        config, layout = self.config, self._layout(context)
        responses = [r for t in trajectories if (r := self._response(t, layout)).num_targets]
        tokens = context.global_sum(float(sum(r.num_targets for r in responses)))
        if config.variant == "ar":
            packs = list(rows_of_causal(responses, row_budget=config.rows_per_forward))
        elif config.variant == "trace":
            packs = layout.rows(self._traces(responses, layout, context))
        else:
            packs = layout.rows([self._masked(r, layout, context.iteration) for r in responses])
        context.metrics |= row_counts(packs, len(responses))
        divisor = max(1.0, tokens) * config.num_samples
        return [States(rows=rows.to(context.device), divisor=divisor) for rows in packs]

    def _layout(self, context: Context) -> Layout:
        family = self._policy.family
        return Layout(
            kind=family.kind,
            # what a block model sees is not a matter of options
            block_size=family.block_size if family.kind == "block" else self.rollout.block_size,
            mask_id=self.mask_id,
            shrink=self.config.shrink,
            row_budget=self.config.rows_per_forward,
            device=context.device,
        )

    def _response(self, trajectory: Trajectory, layout: Layout) -> Traced:
        options: dict[str, Any] = {
            "kind": layout.kind,
            "eos_ids": self._policy.family.eos_ids,
            "block_size": layout.block_size,
            "num_pads": self.config.num_pads,
        }
        if self.config.variant == "trace" and trajectory.step_map is not None:
            return recorded(trajectory, **options)
        return demonstrated(trajectory, window=self.rollout.max_new_tokens, **options)

    def _masked(self, response: Traced, layout: Layout, iteration: int) -> Traced:
        """Drawn masks: over the response, or block by block."""
        by_block = self.config.variant == "semi_ar"
        masked = randomly_masked(
            response,
            estimator="random_masking",
            num_masks=self.config.num_samples,
            low=self.config.mask_low,
            high=self.config.mask_high,
            block_size=layout.block_size if by_block else None,
            offset=0 if layout.kind == "full" else None,
            seed=mix64(self.seed, iteration),
        )
        if by_block and layout.kind == "full":
            return one_block_at_a_time(masked, layout.block_size)
        return masked

    def _traces(self, responses: list[Traced], layout: Layout, context: Context) -> list[Traced]:
        """Recorded orders as they are, those of other demonstrations from the policy as it is."""
        family = self._policy.family

        def confidence(rows: TargetRows) -> Tensor:
            request = StatsRequest(
                rows=self._policy.predicting_rows(rows.rows, rows.visibility),
                forbid_ids=tuple(dict.fromkeys((family.mask_id, *family.unused_ids))),
            )
            found: Tensor = context.score(rows.input_ids, rows.visibility, stats=request).confidence
            return found

        without = [r for r in responses if not r.is_recorded]
        collected = iter(
            collect_traces(
                without,
                layout=layout,
                tokens_per_step=self.config.tokens_per_step,
                confidence=confidence,
            )
        )
        return [r if r.is_recorded else next(collected) for r in responses]


def _fitting(family: Any) -> tuple[Variant, ...]:
    """The variants whose states a model's attention can see."""
    if family.kind == "causal":
        return ("ar",)
    if family.kind == "block":
        return ("semi_ar", "trace")
    shifted: tuple[Variant, ...] = ("ar",) if family.logit_shift == 1 else ()
    return ("elbo", "random_masking", "semi_ar", "trace", *shifted)


def _check_family(variant: Variant, family: Any) -> None:
    fitting = _fitting(family)
    if variant in fitting:
        return
    reason, models = {
        "ar": ("rows predict the next token", "causal attention or a logit shift (Qwen, Dream)"),
        "semi_ar": ("masks are filled in", "full or block attention (LLaDA, Dream, SDAR, tiny)"),
        "trace": ("masks are filled in", "full or block attention (LLaDA, Dream, SDAR, tiny)"),
    }.get(
        variant,
        ("masked copies are scored under full attention", "full attention (LLaDA, Dream, tiny)"),
    )
    shift = f" with logit shift {family.logit_shift}" if variant == "ar" else ""
    raise ValueError(
        f"algorithm.variant={variant}: {reason}, and this model's attention is {family.kind!r}"
        f"{shift}; take a model with {models} or set algorithm.variant to {' or '.join(fitting)}"
    )
