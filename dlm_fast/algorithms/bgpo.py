"""Boundary-guided policy optimisation.  Lin, Zhang, Hou, Li, 2025, arXiv 2510.11683

    R_i    = A_i * exp(Delta_i)
    Delta_i = c * (Bhat_theta(y_i) - Bhat_old(y_i)) = mean over j of d_ij
    Rlb_i  = (1/n) sum_j phi_ij  <=  R_i                     a sum over Monte Carlo samples
    phi_ij = A_i * (1 + d_ij)     if A_i >= 0                e^x >= 1 + x              (Lemma 1)
    phi_ij = A_i * exp(d_ij)      if A_i <  0                e^mean <= mean of e^      (Lemma 2)
    loss   = -(1/(B G)) sum over prompts and rollouts of Rlb_i
    d loss = -(1/(B G n)) sum_ij A_i * kappa_ij * c * d ell_theta,ij,    kappa_ij = 1 or exp(d_ij)

A sample's gradient needs no other sample, so memory does not grow with n. While theta = old, every
d is 0 and kappa 1: no old pass at all. With A_i > 0, kappa is 1 whatever old was.

    A_i       advantage_K      group_advantage of the rewards
    n         num_samples      masks per response (n_t in the paper)
    B G       micro.divisor    rollouts of the update, over all ranks, those with A_i = 0 included
    c         scale_K          1/L, 1 or 1/window (length_normalizer)
    ell_ij    ell_K            one sample of the ELBO, elbo.py
    d_ij      log_ratio_K      c * (ell_theta,ij - ell_old,ij), both on the same mask
    phi_ij    value_K          lower_bound
    kappa_ij  kappa_K          lower_bound

Left open by the paper, chosen here: c = 1/L, the unbiased standard deviation, no clipping, and old
values only where the gradient needs them. ``exact_two_pass`` maximises R_i itself, in constant
memory too (VRPO-OL): a pass without gradient, then sample by sample with kappa_i = exp(Delta_i).

Shapes: K masked copies, N masked tokens, G rollouts of a prompt, R rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlm_fast.algorithms.advantages import Baseline, group_advantage
from dlm_fast.algorithms.contract import (
    Algorithm,
    Context,
    Metrics,
    SamplingPlan,
    TrainedModule,
    Update,
)
from dlm_fast.algorithms.elbo import (
    MaskedCopies,
    Masking,
    Micro,
    Sampler,
    micro_batches,
)
from dlm_fast.algorithms.mini_batches import MiniBatches
from dlm_fast.algorithms.options import (
    check_choices,
    check_mini_batch,
    check_pairs,
    check_positive,
)
from dlm_fast.algorithms.scorer import Scorer
from dlm_fast.ops import mix64
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

MAX_LOG_RATIO = 20.0
"""exp of more is no ratio of use, and soon not finite; a metric says how often it binds"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """BGPO: policy gradient on a lower bound whose memory does not grow with the samples."""

    num_samples: int = 16
    """Monte Carlo masks per response"""
    sampler: Sampler = "l_strat"
    """how masks are drawn. l_strat: stratified numbers of masked tokens. coupled_strat: the same in
    complementary pairs, the quietest gradients. l_iid, coupled: without strata.
    l_linspace: strata as published, biased unless num_samples divides the length. bern_t: each
    token with probability t. quad_t: Gauss-Legendre nodes, biased"""
    bound: Literal["both", "taylor_only", "jensen_only", "exact_two_pass"] = "both"
    """both: the paper's lower bound. taylor_only, jensen_only: one lemma for both signs, no lower
    bound any more. exact_two_pass: the objective itself, one more pass per off-policy update"""
    length_normalizer: Literal["length", "none", "window"] = "length"
    """c of the log-ratio: 1/L with L scored tokens, 1, or 1/rollout.max_new_tokens"""
    estimator: Literal["elbo", "block"] = "elbo"
    """elbo: masks fall anywhere in the response. block: in one block of rollout.block_size, the
    earlier ones clean and the later ones masked, as decoding sees them"""
    scored_tokens: Literal["window", "response"] = "window"
    """window: all decoded tokens, those after the first end-of-text too. response: up to it"""
    samples_per_forward: int = 4
    """masks of a response per forward; changes memory and time, not the result"""
    group_size: int = 8
    """rollouts per prompt"""
    mini_batch: int | None = None
    """rollouts per optimizer step, over all processes, a multiple of group_size; None: all of an
    iteration, which is on-policy"""
    advantage: Baseline = "std"
    """reward less the group's mean, divided by its standard deviation (std), undivided (mean), less
    the mean of the others (leave_one_out), or the bare reward (none)"""
    clip_low: float | None = None
    """ratios below 1 - clip_low give no gradient where the advantage is negative; None: no clip"""
    clip_high: float | None = None
    """ratios above 1 + clip_high give no gradient where the advantage is positive; None: no clip"""
    dual_clip: float | None = None
    """ratios above it give no gradient where the advantage is negative; breaks the lower bound"""
    old_values: Literal["needed", "all"] = "needed"
    """rollouts of later optimizer steps whose old ELBO is computed: those whose gradient needs it,
    or all, which completes policy/objective and the log-ratio metrics"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "num_samples", "samples_per_forward", "group_size")
        check_pairs(self.sampler, self.num_samples)
        check_mini_batch(self.mini_batch, self.group_size)
        if self.clip_low is not None and not 0 < self.clip_low < 1:
            raise ValueError(f"algorithm.clip_low must lie between 0 and 1, got {self.clip_low}")
        if self.clip_high is not None and not self.clip_high > 0:
            raise ValueError(f"algorithm.clip_high must be positive, got {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1 + (self.clip_high or 0):
            raise ValueError(
                f"algorithm.dual_clip must exceed 1 + algorithm.clip_high, got {self.dual_clip}"
            )

    @property
    def clips(self) -> bool:
        """Some ratio may be clipped."""
        return any(x is not None for x in (self.clip_low, self.clip_high, self.dual_clip))

    def needs_old(self, advantage: float) -> bool:
        """An off-policy rollout's ratio to the old policy is asked for."""
        if self.clips or self.old_values == "all" or self.bound == "exact_two_pass":
            return True
        return self.bound == "jensen_only" or (self.bound == "both" and advantage < 0)

    def build(self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int) -> BGPO:
        """The algorithm for one run."""
        return BGPO(self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed)


def lower_bound(advantage_K: Tensor, log_ratio_K: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """phi_ij and kappa_ij = (d phi_ij / d d_ij) / A_i of every sample."""
    taylor_K = 1 + log_ratio_K
    jensen_K = log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if config.bound == "both":
        by_jensen_K = advantage_K < 0
    else:
        by_jensen_K = torch.full_like(advantage_K, config.bound == "jensen_only", dtype=torch.bool)
    ratio_K = torch.where(by_jensen_K, jensen_K, taylor_K)
    kappa_K = torch.where(by_jensen_K, jensen_K, torch.ones_like(jensen_K))
    return clip(advantage_K, ratio_K, kappa_K, config)


def exact(advantage_R: Tensor, log_ratio_R: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """R_i and kappa_i = (d R_i / d Delta_i) / A_i of every rollout, from its Delta_i."""
    ratio_R = log_ratio_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return clip(advantage_R, ratio_R, ratio_R, config)


def clip(
    advantage_K: Tensor, ratio_K: Tensor, kappa_K: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """min(A r, A clip(r)), still a lower bound of A r, and no gradient where the clip decides."""
    if not config.clips:
        return advantage_K * ratio_K, kappa_K
    low = -torch.inf if config.clip_low is None else 1 - config.clip_low
    high = torch.inf if config.clip_high is None else 1 + config.clip_high
    value_K = torch.minimum(advantage_K * ratio_K, advantage_K * ratio_K.clamp(low, high))
    if config.dual_clip is not None:
        floor_K = torch.maximum(value_K, advantage_K * config.dual_clip)
        value_K = torch.where(advantage_K < 0, floor_K, value_K)
    return value_K, torch.where(value_K == advantage_K * ratio_K, kappa_K, 0.0)


@dataclass(kw_only=True, eq=False)
class Rollout:
    """A rollout as the loss sees it; the fields from ``value`` on change before the forward."""

    trajectory: Trajectory
    advantage: float
    """A_i"""
    length: int
    """L, scored tokens"""
    scale: float
    """c"""
    needs_old: bool
    """ell_old is asked for"""
    value: float
    """R_i as far as it is known before the forward; A_i while theta = old"""
    kappa: float = 1.0
    log_ratio: float = 0.0
    """Delta_i; nan: not known, not needed"""
    old_n: Tensor | None = None
    """[n], ell_old,ij"""


class BGPO(Algorithm):
    """See the module's text. ``modules`` comes first: the policy's family shapes the requests."""

    def __init__(
        self, config: Config, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> None:
        self.config = config
        self.rollout = rollout
        self.num_prompts = num_prompts
        self.mask_id = mask_id
        self.seed = seed
        self.mini_batches = MiniBatches(
            num_prompts=num_prompts, group_size=config.group_size, mini_batch=config.mini_batch
        )
        self.num_updates = self.mini_batches.num_updates
        self.scorer = Scorer(mask_id=mask_id)

    def loss(self, micro: Micro, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """-(1/(B G n)) * sum of phi_ij over the micro-batch, with its gradient."""
        copies = micro.draw()
        advantage_K = micro.per_copy(copies, "advantage")
        scale_K = micro.per_copy(copies, "scale")
        share = 1 / (micro.divisor * self.config.num_samples)
        if self._compares(micro):
            ell_K = self.scorer.ell(copies, forward)
            log_ratio_K = scale_K * (ell_K.detach() - _old(micro, copies))
            value_K, kappa_K = lower_bound(advantage_K, log_ratio_K, self.config)
            weight_K = share * scale_K * advantage_K * kappa_K
            surrogate = -(weight_K.to(ell_K.dtype) * ell_K).sum()
        else:
            value_K, kappa_K = micro.per_copy(copies, "value"), micro.per_copy(copies, "kappa")
            log_ratio_K = micro.per_copy(copies, "log_ratio")
            log_ratio_K = log_ratio_K[: 0 if math.isnan(micro.records[0].log_ratio) else None]
            weight_K = share * scale_K * advantage_K * kappa_K
            surrogate, ell_K = self.scorer.weighted_ell(copies, -weight_K, forward)
        # the surrogate has the gradient of minus the bound, but another value
        value = (share * value_K.sum()).to(surrogate.dtype)
        loss = surrogate - (surrogate.detach() + value)
        per_token_K = ell_K.detach() / micro.per_copy(copies, "length")
        return loss, self._metrics(ell_K.detach(), per_token_K, log_ratio_K, kappa_K, value_K)

    def modules(self, policy: nn.Module) -> dict[str, TrainedModule]:
        self.scorer.bind(policy)
        return super().modules(policy)

    def sampling(self, iteration: int) -> SamplingPlan:
        return SamplingPlan(
            num_prompts=self.num_prompts, group_size=self.config.group_size, sampler=self.rollout
        )

    def prepare(self, groups: list[Group], context: Context) -> list[list[Micro]]:
        """Micro-batches of every optimizer step; old values where a gradient needs them."""
        masking = self._masking(context.iteration)
        by_update: list[list[Rollout]] = [[] for _ in range(self.num_updates)]
        for group in groups:
            advantage_G = group_advantage(group.rewards, self.config.advantage).tolist()
            for trajectory, advantage in zip(group.trajectories, advantage_G, strict=True):
                update = self.mini_batches.update_of(trajectory.group_id)
                length = masking.num_scored(trajectory)
                by_update[update].append(self._rollout(trajectory, advantage, length, update > 0))
        everyone = [rollout for members in by_update for rollout in members]
        idle = sum(rollout.advantage == 0 for rollout in everyone)
        context.metrics["policy/zero_advantage_fraction"] = (float(idle), float(len(everyone)))
        updates = [self._micros(members, masking, context) for members in by_update]
        waiting = [micro for micros in updates for micro in micros if _needs_old(micro)]
        for rollout, ell_n in self._ells(waiting, context.score).items():
            rollout.old_n = ell_n
        return updates

    def updates(self, samples: list[list[Micro]], context: Context) -> Iterator[Update]:
        for update, micros in enumerate(samples):
            if update > 0 and self.config.bound == "exact_two_pass":
                self._first_pass(micros, context)
            yield Update(micros=micros)

    def _rollout(
        self, trajectory: Trajectory, advantage: float, length: int, off_policy: bool
    ) -> Rollout:
        needs_old = off_policy and self.config.needs_old(advantage)
        window = self.rollout.max_new_tokens
        scales = {"length": 1 / max(1, length), "none": 1.0, "window": 1 / window}
        return Rollout(
            trajectory=trajectory,
            advantage=advantage,
            length=length,
            scale=scales[self.config.length_normalizer],
            needs_old=needs_old,
            value=advantage,
            log_ratio=math.nan if off_policy else 0.0,
        )

    def _micros(self, members: list[Rollout], masking: Masking, context: Context) -> list[Micro]:
        """Rollouts that need old values and those that do not never share a micro-batch."""
        divisor = max(1.0, context.global_sum(len(members)))
        trained = [r for r in members if r.advantage != 0 and r.length > 0]
        return [
            micro
            for needs_old in (False, True)
            for micro in micro_batches(
                [rollout for rollout in trained if rollout.needs_old == needs_old],
                masking,
                divisor=divisor,
                max_records=context.micro_batch,
                max_samples=self.config.samples_per_forward,
                device=context.device,
            )
        ]

    def _compares(self, micro: Micro) -> bool:
        """kappa_ij follows from the forward; it is known before in all other cases."""
        return _needs_old(micro) and self.config.bound != "exact_two_pass"

    def _ells(self, micros: Iterable[Micro], score: Callable[..., Any]) -> dict[Rollout, Tensor]:
        """[n], ell_ij of every sample of each rollout, without gradient."""
        parts: dict[Rollout, list[Tensor]] = {}
        for micro in micros:
            copies = micro.draw()
            ell_K = self.scorer.ell(copies, score)
            for r, rollout in enumerate(micro.records):
                parts.setdefault(rollout, []).append(ell_K[copies.response_K == r])
        return {rollout: torch.cat(part) for rollout, part in parts.items()}

    def _first_pass(self, micros: list[Micro], context: Context) -> None:
        """Delta_i under the present weights, from it R_i and kappa_i for the second pass."""
        ells = self._ells(self._in_step(micros, context), context.score)
        if not ells:
            return
        advantage_R = torch.tensor([r.advantage for r in ells], dtype=torch.float64)
        old_Rn = torch.stack([rollout.old_n for rollout in ells if rollout.old_n is not None])
        scale_R = torch.tensor([rollout.scale for rollout in ells], dtype=torch.float64)
        log_ratio_R = scale_R * (torch.stack([*ells.values()]) - old_Rn).double().mean(1).cpu()
        value_R, kappa_R = exact(advantage_R, log_ratio_R, self.config)
        for r, rollout in enumerate(ells):
            rollout.log_ratio = log_ratio_R[r].item()
            rollout.value, rollout.kappa = value_R[r].item(), kappa_R[r].item()

    def _in_step(self, micros: list[Micro], context: Context) -> Iterator[Micro]:
        """The micro-batches. Where weights are sharded each forward is a collective: a rank that
        is done goes on with idle ones until all are."""
        for micro in micros:
            context.global_sum(1.0)
            yield micro
        while context.global_sum(0.0) > 0:
            self.scorer.idle(context.score, context.device)

    def _masking(self, iteration: int) -> Masking:
        return Masking(
            mask_id=self.mask_id,
            seed=mix64(self.seed, iteration),
            sampler=self.config.sampler,
            num_samples=self.config.num_samples,
            estimator=self.config.estimator,
            block_size=self.rollout.block_size,
            scored_tokens=self.config.scored_tokens,
        )

    def _metrics(
        self,
        ell_K: Tensor,
        per_token_K: Tensor,
        log_ratio_K: Tensor,
        kappa_K: Tensor,
        value_K: Tensor,
    ) -> Metrics:
        """(sum, count) over copies with an advantage, those of known ratio for log-ratios; read
        from the device in one go."""
        counted = {
            "elbo/mean": ell_K,
            "elbo/per_token": per_token_K,
            "policy/kappa_mean": kappa_K,
            "policy/clip_fraction": kappa_K == 0,
            "policy/log_ratio_mean": log_ratio_K,
            "policy/log_ratio_square": log_ratio_K.square(),
            "policy/log_ratio_clamped": log_ratio_K.abs() > MAX_LOG_RATIO,
        }
        if self.num_updates == 1 or all(self.config.needs_old(sign) for sign in (1.0, -1.0)):
            counted["policy/objective"] = value_K
        sums = torch.stack([values.double().sum() for values in counted.values()]).tolist()
        counts = [float(values.numel()) for values in counted.values()]
        return dict(zip(counted, zip(sums, counts, strict=True), strict=True))


def _needs_old(micro: Micro) -> bool:
    return bool(micro.records[0].needs_old)


def _old(micro: Micro, copies: MaskedCopies) -> Tensor:
    """[K], ell_old,ij of each copy."""
    old_Rn = torch.stack([rollout.old_n for rollout in micro.records])
    return old_Rn[copies.response_K, copies.sample_K]
