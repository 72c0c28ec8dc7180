"""TraceRL: policy optimisation along the trajectory that decoding really took.

Each token is scored in the state in which it was revealed: the tokens of earlier steps visible, the
others masked. With D = log pi(o | state) - log pi_old(o | state) and rho = exp(D)

    J = average over target tokens of  min(rho A, clip(rho, 1 - eps, 1 + eps) A)  -  beta KL(D)

``shrink`` merges so many neighbouring steps, which saves passes and scores the merged tokens as if
they had been revealed together. A_i is the reward's z-score in its group; with a value model each
token has its own, from returns over steps (``trace_returns``).

Source: TraceRL, arXiv 2509.06949, equations 3 to 6; averaging, KL estimates and old log-
probabilities also follow its open trainer. Baselines ``random_masking`` and ``coupled``
(DiffuCoder, arXiv 2506.20639) put drawn masks in place of the trace.

Symbols: o_k token; tau(t) tokens of step t; s ``shrink``; C_eps ``clipped_objective``; A_ik
``Tokens.advantage``; pi_old the policy at the start of the iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlm_fast.algorithms.advantages import Baseline, group_advantage
from dlm_fast.algorithms.clipped_loss import (
    KL,
    MAX_LOG_RATIO,
    LossAgg,
    clipped_objective,
    clipped_value_loss,
    kl_estimate,
)
from dlm_fast.algorithms.contract import (
    Algorithm,
    Context,
    Metrics,
    SamplingPlan,
    TrainedModule,
    Update,
)
from dlm_fast.algorithms.mini_batches import MiniBatches
from dlm_fast.algorithms.options import (
    check_choices,
    check_mini_batch,
    check_positive,
    check_range,
)
from dlm_fast.algorithms.trace_rows import Estimator, TargetRows, Traced, randomly_masked, traced
from dlm_fast.algorithms.trace_tokens import (
    Layout,
    Record,
    Tokens,
    assign_returns,
    has_share,
    row_counts,
    token_metrics,
)
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.models.value import ValueModel
from dlm_fast.ops import mix64
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory


@dataclass(frozen=True, kw_only=True)
class Config:
    """TraceRL: every token is scored in the state in which it was revealed."""

    group_size: int = 8
    """rollouts per prompt"""
    shrink: int = 1
    """neighbouring steps that are merged: inside each block for block models, over the whole
    response for full-attention ones, which need a pass per merged step (the paper takes 8)"""
    estimator: Estimator = "trace"
    """trace: the states of the rollout. random_masking, coupled: drawn masks instead, the baselines
    of the paper; coupled draws pairs of a mask and its complement"""
    num_masks: int = 1
    """drawn masks per response, for the estimators random_masking and coupled (coupled: even)"""
    mask_low: float = 0.1
    """lowest rate of drawn masks"""
    mask_high: float = 0.9
    """highest rate of drawn masks"""
    clip_low: float = 0.2
    """ratios below 1 - clip_low give no gradient where the advantage is negative"""
    clip_high: float = 0.2
    """ratios above 1 + clip_high give no gradient where the advantage is positive"""
    kl: KL = "k3"
    """estimate of the divergence from the policy of the iteration's start. k1 pushes every token
    with the same force, however far it has moved"""
    kl_weight: float = 0.01
    """beta; 0: no such term"""
    loss_agg: LossAgg = "token_mean"
    """how the tokens' terms are averaged. token_mean: over all of an optimizer step. step_mean:
    over each step's tokens, summed over steps (the paper). seq_mean_len: over each response.
    slice_mean, slice_len: as trainers with one pass per slice do; slice_len divides by
    rollout.max_new_tokens"""
    old_logprob: Literal["recompute", "rollout", "decoupled"] = "recompute"
    """recompute: in the training layout, before the first step. rollout: as recorded while
    decoding. decoupled: recomputed, weighted with how far the rollout was from it (at most
    ``decoupled_cap``)"""
    decoupled_cap: float = 2.0
    """largest importance weight of ``decoupled``"""
    advantage: Baseline = "zscore"
    """reward less the group's mean, over its population standard deviation (zscore) or the unbiased
    one (std), undivided (mean), less the mean of the others (leave_one_out), bare (none)"""
    drop_below: float = 0.0
    """groups with a smaller share of correct rollouts are left out"""
    drop_above: float = 1.0
    """groups with a larger share of correct rollouts are left out"""
    epochs: int = 1
    """passes over the rollouts of an iteration"""
    mini_batch: int | None = None
    """rollouts per optimizer step, over all processes, a multiple of group_size; None: all"""
    num_pads: int = 0
    """targets behind the first end of text; 0 can leave a model that never stops"""
    score_temperature: float = 1.0
    """logits are divided by it when tokens are scored; take rollout.temperature to score the
    distribution that was drawn from"""
    rows_per_forward: int = 8192
    """packed tokens of a forward; a single response may need more. Changes memory and time, not the
    result"""
    value: Literal["none", "own"] = "none"
    """own: a value model with a backbone of its own, a copy of the policy's, and step-level
    advantages"""
    gamma: float = 1.0
    """discount per step, with a value model or token rewards"""
    lam: float = 1.0
    """lambda of the generalised advantages, per step"""
    value_lr_scale: float = 5.0
    """learning rate of the value model relative to train.lr"""
    value_epochs: int = 1
    """passes of the value model over the rollouts of an iteration"""
    value_clip: float = 0.2
    """how far a value may move before its loss is the larger one"""
    value_pretraining: int = 0
    """first iterations that train the value model alone"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(
            self, "group_size", "shrink", "num_masks", "epochs", "rows_per_forward", "value_epochs"
        )
        check_range(self, 0, self.mask_high, "mask_low")
        check_range(self, 0, 1, "mask_high", "clip_low", "drop_above", "gamma", "lam")
        check_range(self, 0, self.drop_above, "drop_below")
        check_range(
            self,
            0,
            math.inf,
            "clip_high",
            "kl_weight",
            "num_pads",
            "value_pretraining",
            "value_clip",
        )
        check_range(self, 1e-6, math.inf, "score_temperature", "decoupled_cap", "value_lr_scale")
        check_mini_batch(self.mini_batch, self.group_size)
        if self.estimator != "trace" and (self.shrink > 1 or self.old_logprob != "recompute"):
            raise ValueError(
                f"algorithm.estimator={self.estimator} has no steps to shrink and no log-"
                "probabilities of the rollout; set shrink=1 and old_logprob=recompute"
            )
        if self.estimator == "coupled" and self.num_masks % 2:
            raise ValueError(
                f"algorithm.estimator=coupled draws pairs, so algorithm.num_masks must be even; "
                f"got {self.num_masks}"
            )
        if self.old_logprob != "recompute" and self.score_temperature != 1:
            raise ValueError(
                f"algorithm.old_logprob={self.old_logprob} takes log-probabilities recorded at "
                f"temperature 1; algorithm.score_temperature={self.score_temperature} needs "
                "old_logprob=recompute"
            )
        if self.value_pretraining and self.value == "none":
            raise ValueError("algorithm.value_pretraining needs a value model: algorithm.value=own")

    def build(
        self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> TraceRL:
        """The algorithm for one run."""
        return TraceRL(self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed)


@dataclass(kw_only=True, eq=False)
class Samples:
    """What an iteration trains on."""

    policy: list[list[Tokens]]
    """by optimizer step of an epoch"""
    value: list[Tokens]


class TraceRL(Algorithm):
    """See the module's text. ``modules`` comes first: the policy's family shapes the rows."""

    def __init__(
        self, config: Config, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> None:
        self.config, self.rollout = config, rollout
        self.num_prompts, self.mask_id, self.seed = num_prompts, mask_id, seed
        self.mini_batches = MiniBatches(
            num_prompts=num_prompts, group_size=config.group_size, mini_batch=config.mini_batch
        )
        self._policy: Any = None
        self._forbid_ids: tuple[int, ...] = ()

    def loss(self, micro: Tokens, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """Minus the objective over the tokens of one forward."""
        config, share_U = self.config, micro.share / micro.divisor
        if micro.old is None:
            # D = 0: the slope of -A rho is -A, that of k1 is 1, that of k2 and k3 is 0. Weights
            # that are known before the forward need no second pass over the head.
            slope = config.kl_weight if config.kl == "k1" else 0.0
            output = self._score(micro.rows, forward, share_U * (slope - micro.advantage))
            surrogate, logprob_U = output.objective, output.logprob
            value = -(share_U * micro.advantage).sum().to(surrogate.dtype)
            loss = surrogate - surrogate.detach() + value
            log_ratio_U = torch.zeros_like(share_U)
        else:
            logprob_U = self._score(micro.rows, forward, None).logprob
            log_ratio_U = logprob_U.double() - micro.old
            gain_U = self._behaviour(micro) * clipped_objective(
                log_ratio_U, micro.advantage, config.clip_low, config.clip_high
            )
            divergence_U = kl_estimate(log_ratio_U, config.kl)
            loss = (share_U * (config.kl_weight * divergence_U - gain_U)).sum()
            loss = loss.to(logprob_U.dtype)
        return loss, token_metrics(micro, logprob_U, log_ratio_U, config)

    def value_loss(self, micro: Tokens, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """Clipped regression of V on the returns."""
        assert micro.old_value is not None and micro.returns is not None
        value_U = self._value(micro.rows, forward)
        terms_U = clipped_value_loss(
            value_U.double(), micro.old_value, micro.returns, self.config.value_clip
        )
        loss = (micro.share / micro.divisor * terms_U).sum()
        error_U = (value_U.detach().double() - micro.returns).square()
        count = float(terms_U.numel())
        metrics: Metrics = {
            "value/loss": (terms_U.sum().item(), count),
            "value/error": (error_U.sum().item(), count),
        }
        return loss.to(value_U.dtype), metrics

    def modules(self, policy: nn.Module) -> dict[str, TrainedModule]:
        bare: Any = policy
        family = bare.family
        if family.kind == "causal":
            raise ValueError(
                f"TraceRL follows denoising steps, and model family {family.model_type!r} is "
                "causal; take a diffusion model (LLaDA, Dream, SDAR, tiny)"
            )
        self._policy = bare
        self._forbid_ids = self.rollout.never_drawn(family)
        trained = super().modules(policy)
        if self.config.value == "own":
            trained["value"] = TrainedModule(
                module=ValueModel(bare),
                idle_loss=lambda module: module(idle=True),
                lr_scale=self.config.value_lr_scale,
            )
        return trained

    def sampling(self, iteration: int) -> SamplingPlan:
        return SamplingPlan(
            num_prompts=self.num_prompts, group_size=self.config.group_size, sampler=self.rollout
        )

    def prepare(self, groups: list[Group], context: Context) -> Samples:
        """Rows of all optimizer steps, advantages, old log-probabilities and values."""
        records = self._records(groups, context)
        steps = []
        for update in range(self.mini_batches.num_updates):
            members = [record for record in records if record.update == update]
            steps.append(self._step(members, update, context))
        everything = [tokens for step in steps for tokens in step]
        context.metrics |= row_counts([t.rows for t in everything], len(records))
        policy = [] if context.iteration < self.config.value_pretraining else steps
        return Samples(policy=policy, value=everything if self.config.value == "own" else [])

    def updates(self, samples: Samples, context: Context) -> Iterator[Update]:
        if self.config.value == "own":
            targets = sum(tokens.rows.rows.numel() for tokens in samples.value)
            divisor = max(1.0, context.global_sum(float(targets)))
            regression = [tokens.evenly(divisor) for tokens in samples.value]
            for _ in range(self.config.value_epochs):
                yield Update(micros=regression, module="value", loss=self.value_loss)
        for _ in range(self.config.epochs):
            for tokens in samples.policy:
                yield Update(micros=tokens)

    def _records(self, groups: Sequence[Group], context: Context) -> list[Record]:
        """Rollouts of the groups that are kept, with something to learn from."""
        config, records = self.config, []
        kept = [g for g in groups if has_share(g, config.drop_below, config.drop_above)]
        for group in kept:
            advantage_G = group_advantage(group.rewards, config.advantage).tolist()
            for trajectory, advantage in zip(group.trajectories, advantage_G, strict=True):
                response = self._traced(trajectory, context.iteration)
                if response.num_targets == 0:
                    continue
                update = self.mini_batches.update_of(trajectory.group_id)
                records.append(Record(traced=response, advantage=advantage, update=update))
        dropped = float(len(groups) - len(kept))
        context.metrics["trace/dropped_groups"] = (dropped, float(len(groups)))
        return records

    def _traced(self, trajectory: Trajectory, iteration: int) -> Traced:
        config, family = self.config, self._policy.family
        block_size = self.rollout.block_size
        response = traced(
            trajectory,
            kind=family.kind,
            eos_ids=family.eos_ids,
            block_size=block_size,
            num_pads=config.num_pads,
        )
        if config.estimator == "trace":
            return response
        return randomly_masked(
            response,
            estimator=config.estimator,
            num_masks=config.num_masks,
            low=config.mask_low,
            high=config.mask_high,
            block_size=block_size if family.kind == "block" else None,
            seed=mix64(self.seed, iteration),
        )

    def _step(self, members: list[Record], update: int, context: Context) -> list[Tokens]:
        """One optimizer step: rows, averaging, values and old log-probabilities."""
        config = self.config
        layout = Layout(
            kind=self._policy.family.kind,
            block_size=self.rollout.block_size,
            mask_id=self.mask_id,
            shrink=config.shrink,
            row_budget=config.rows_per_forward,
            device=context.device,
        )
        made, divisor = layout.tokens(members, config.loss_agg, self.rollout.max_new_tokens)
        divisor = max(1.0, context.global_sum(divisor))
        moved = update > 0 or config.epochs > 1
        by_steps = config.value == "own" or any(r.token_rewards is not None for r in members)
        with torch.no_grad():
            values = [
                self._value(one.rows, context.score, module="value")
                if config.value == "own"
                else torch.zeros_like(one.share)
                for one in (made if by_steps else [])
            ]
            if made and by_steps:
                explained = assign_returns(made, members, values, config.gamma, config.lam)
                if config.value == "own":
                    context.metrics["value/explained_variance"] = explained
            for one in made:
                one.divisor = divisor
                if config.old_logprob == "rollout":
                    one.old = one.rollout
                elif moved or config.old_logprob == "decoupled":
                    one.old = self._score(one.rows, context.score, None).logprob.double()
        return made

    def _score(self, rows: TargetRows, forward: Callable[..., Any], weight: Tensor | None) -> Any:
        request = ScoreRequest(
            rows=self._policy.predicting_rows(rows.rows, rows.visibility),
            targets=rows.targets,
            weights=weight,
            temperature=self.config.score_temperature,
            forbid_ids=self._forbid_ids,
            in_loss=weight is not None,
        )
        return forward(rows.input_ids, rows.visibility, score=request)

    def _value(self, rows: TargetRows, forward: Callable[..., Any], **options: Any) -> Tensor:
        """V of the masked tokens themselves, whichever rows predict them."""
        return forward(rows.input_ids, rows.visibility, rows=rows.rows, **options)

    def _behaviour(self, micro: Tokens) -> Tensor | float:
        """How far pi_old is from the distribution that the rollout recorded."""
        if self.config.old_logprob != "decoupled":
            return 1.0
        assert micro.rollout is not None and micro.old is not None
        ratio_U = (micro.old - micro.rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        return ratio_U.clamp(max=self.config.decoupled_cap)
