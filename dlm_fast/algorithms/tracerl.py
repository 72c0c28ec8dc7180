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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dlm_fast.algorithms.advantages import group_advantage
from dlm_fast.algorithms.clipped_loss import (
    MAX_LOG_RATIO,
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
from dlm_fast.algorithms.schedule import Schedule, Stage
from dlm_fast.algorithms.target_scores import score_targets
from dlm_fast.algorithms.trace_rows import (
    TargetRows,
    Traced,
    length_to_end,
    randomly_masked,
    traced,
)
from dlm_fast.algorithms.trace_tokens import (
    Layout,
    Record,
    Tokens,
    assign_returns,
    explained_variance,
    has_share,
    row_counts,
    token_metrics,
)
from dlm_fast.algorithms.tracerl_options import TraceOptions
from dlm_fast.models.value import SharedValue, ValueModel
from dlm_fast.ops import mix64
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory, trajectories_of


@dataclass(frozen=True, kw_only=True)
class Config(TraceOptions):
    """TraceRL: every token is scored in the state in which it was revealed."""

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
        self.schedule = Schedule(config.schedule, rollout)
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
        value_U = (
            self._value(micro.rows, forward) if micro.hidden is None else forward(micro.hidden)
        )
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
        self._check_blocks(family)
        self._policy = bare
        self._forbid_ids = self.rollout.never_drawn(family)
        trained = super().modules(policy)
        if self.config.value != "none":
            trained["value"] = TrainedModule(
                module=ValueModel(bare) if self.config.value == "own" else SharedValue(bare),
                idle_loss=lambda module: module(idle=True),
                lr_scale=self.config.value_lr_scale,
            )
        return trained

    def sampling(self, iteration: int) -> SamplingPlan:
        return SamplingPlan(
            num_prompts=self.num_prompts,
            group_size=self.config.group_size,
            sampler=self._stage(iteration).rollout,
        )

    def decoding(self, iteration: int, rollout: SamplerConfig) -> SamplerConfig:
        """In the blocks of the phase; responses as long as in the longest one."""
        return replace(rollout, block_size=self._stage(iteration).rollout.block_size)

    def _stage(self, iteration: int) -> Stage:
        """Of an iteration; the policy's own blocks become those that are decoded."""
        stage = self.schedule.at(iteration)
        if self.config.schedule and self._policy.family.kind == "block":
            self._policy.set_block_size(stage.rollout.block_size)
        return stage

    def _check_blocks(self, family: Any) -> None:
        if family.kind == "block" and family.block_size != self.rollout.block_size:
            raise ValueError(
                f"rollout.block_size={self.rollout.block_size} differs from the model's own blocks "
                f"of {family.block_size}; set rollout.block_size={family.block_size}, and other "
                "sizes in algorithm.schedule"
            )
        if family.kind == "block" or self.schedule.block_sizes == {self.rollout.block_size}:
            return
        raise ValueError(
            "algorithm.schedule changes the size of blocks, which only block models attend in; "
            f"model family {family.model_type!r} sees the whole sequence: leave block_size and "
            "train_block_size out"
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
        if self.config.value != "none":
            explained = explained_variance(everything, context.global_sum)
            context.metrics["value/explained_variance"] = explained
        policy = [] if context.iteration < self.config.value_pretraining else steps
        return Samples(policy=policy, value=everything if self.config.value != "none" else [])

    def updates(self, samples: Samples, context: Context) -> Iterator[Update]:
        if self.config.value != "none":
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
        if config.overlong:
            self._refuse_overlong(groups, context)
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

    def _refuse_overlong(self, groups: Sequence[Group], context: Context) -> None:
        window = self._stage(context.iteration).rollout.max_new_tokens
        eos_ids, rollouts = self._policy.family.eos_ids, trajectories_of(groups)
        longest = window - self.config.overlong
        overlong = [t for t in rollouts if length_to_end(t, eos_ids) >= longest]
        for trajectory in overlong:
            trajectory.reward, trajectory.correct = 0.0, False
        context.metrics["trace/overlong"] = (float(len(overlong)), float(len(rollouts)))

    def _traced(self, trajectory: Trajectory, iteration: int) -> Traced:
        config, family = self.config, self._policy.family
        stage = self.schedule.at(iteration)
        block_size = stage.train_block_size
        response = traced(
            trajectory,
            kind=family.kind,
            eos_ids=family.eos_ids,
            block_size=block_size,
            num_pads=config.num_pads,
            window=stage.rollout.max_new_tokens,
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
        config, stage = self.config, self.schedule.at(context.iteration)
        layout = Layout(
            kind=self._policy.family.kind,
            block_size=stage.train_block_size,
            mask_id=self.mask_id,
            shrink=config.shrink,
            row_budget=config.rows_per_forward,
            device=context.device,
        )
        made, divisor = layout.tokens(members, config.loss_agg, stage.rollout.max_new_tokens)
        divisor = max(1.0, context.global_sum(divisor))
        moved = update > 0 or config.epochs > 1
        with torch.no_grad():
            self._assign_returns(made, members, context.score)
            for one in made:
                one.divisor = divisor
                if config.old_logprob == "rollout":
                    one.old = one.rollout
                elif moved or config.old_logprob == "decoupled":
                    one.old = self._score(one.rows, context.score, None).logprob.double()
        return made

    def _assign_returns(
        self, made: list[Tokens], members: list[Record], score: Callable[..., Any]
    ) -> None:
        """V_old, returns and step-level advantages, where there are values or token rewards."""
        config = self.config
        if not made or (config.value == "none" and all(r.token_rewards is None for r in members)):
            return
        values = [self._old_value(one, score) for one in made]
        assign_returns(made, members, values, config.gamma, config.lam)

    def _old_value(self, micro: Tokens, score: Callable[..., Any]) -> Tensor:
        if self.config.value == "none":
            return torch.zeros_like(micro.share)
        if self.config.value == "own":
            return self._value(micro.rows, score, module="value")
        rows = micro.rows
        micro.hidden = score(rows.input_ids, rows.visibility, hidden=rows.rows)
        return score(micro.hidden, module="value")

    def _score(self, rows: TargetRows, forward: Callable[..., Any], weight: Tensor | None) -> Any:
        return score_targets(
            self._policy,
            rows,
            forward,
            weight,
            temperature=self.config.score_temperature,
            forbid_ids=self._forbid_ids,
        )

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
