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

Letters: ``P`` prompts of a forward, ``G`` rollouts of each, ``L`` positions, ``R`` = P G.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlm_fast.algorithms.advantages import group_advantage
from dlm_fast.algorithms.contract import (
    Algorithm,
    Context,
    Metrics,
    Resample,
    SamplingPlan,
    TrainedModule,
    Update,
)
from dlm_fast.algorithms.group_ratio import agg_divisor, averaged, divergence, kept_hints, objective
from dlm_fast.algorithms.igpo_options import IgpoOptions
from dlm_fast.algorithms.inpainting import Inpainting
from dlm_fast.algorithms.mean_field import MaskedWindows, masked_windows
from dlm_fast.algorithms.mini_batches import MiniBatches
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory


@dataclass(frozen=True, kw_only=True)
class Config(IgpoOptions):
    """IGPO: where all rollouts of a prompt fail, some are decoded again around hints."""

    def build(self, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int) -> IGPO:
        """The algorithm for one run."""
        return IGPO(self, rollout=rollout, num_prompts=num_prompts, mask_id=mask_id, seed=seed)


@dataclass(kw_only=True, eq=False)
class Windows:
    """The rollouts of a few prompts: one forward."""

    masked: MaskedWindows
    advantage: Tensor
    """float64 [R]"""
    keep: Tensor
    """bool [R, L], tokens in the loss"""
    hint: Tensor
    """bool [R, L], given tokens"""
    present: Tensor
    """bool [R], False where a prompt has fewer rollouts than others"""
    old: Tensor
    """float [R, L], log p_old"""
    reference: Tensor | None
    """float [R, L], log p of the model at the run's start"""
    divisor: float = 1.0


class IGPO(Algorithm):
    """See the module's text. ``modules`` comes first: the policy's family shapes the requests."""

    def __init__(
        self, config: Config, *, rollout: SamplerConfig, num_prompts: int, mask_id: int, seed: int
    ) -> None:
        self.config, self.rollout = config, rollout
        self.num_prompts, self.mask_id, self.seed = num_prompts, mask_id, seed
        self.mini_batches = MiniBatches(
            num_prompts=num_prompts, group_size=config.group_size, mini_batch=config.mini_batch
        )
        self.inpainting = Inpainting(
            config, window=rollout.max_new_tokens, mask_id=mask_id, seed=seed
        )
        self._policy: Any = None
        self._start: nn.Module | None = None
        self._refined: Metrics = {}

    def loss(self, micro: Windows, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """Minus the objective over the rollouts of some prompts."""
        config, keep_RL = self.config, micro.keep
        output = micro.masked.score(forward)
        logprob_RL = _by_rollout(output.logprob, micro)
        # tokens that are not there have log-probability 0 in both
        log_ratio_RL = logprob_RL - micro.old.to(logprob_RL.dtype)
        gain_RL, ratio_RL = objective(
            log_ratio_RL,
            micro.advantage.to(logprob_RL.dtype),
            keep_RL,
            level=config.ratio_level,
            mask=config.ratio_mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        kl_RL = torch.zeros_like(gain_RL)
        if micro.reference is not None:
            kl_RL = divergence(logprob_RL, micro.reference.to(logprob_RL.dtype), keep_RL)
        loss = averaged(config.kl_weight * kl_RL - gain_RL, keep_RL, config.loss_agg)
        metrics = _metrics(micro, logprob_RL, ratio_RL, kl_RL, config)
        return loss / micro.divisor, metrics

    def modules(self, policy: nn.Module) -> dict[str, TrainedModule]:
        self._policy = policy
        if self.config.kl_weight and self._policy.adapters is None:
            self._start = copy.deepcopy(policy).requires_grad_(False).eval()
        return super().modules(policy)

    def sampling(self, iteration: int) -> SamplingPlan:
        return SamplingPlan(
            num_prompts=self.num_prompts,
            group_size=self.config.group_size,
            sampler=self.rollout,
            traces=self.config.guidance == "inpaint",
        )

    def refine(self, groups: list[Group], resample: Resample) -> list[Group]:
        self._refined = self.inpainting.refine(groups, resample, self._policy)
        return groups

    def prepare(self, groups: list[Group], context: Context) -> list[list[Windows]]:
        """Windows of every optimizer step of an epoch, with old and reference log-probabilities."""
        context.metrics |= self._refined
        steps = []
        for update in range(self.mini_batches.num_updates):
            mine = [g for g in groups if self._update_of(g) == update and self._teaches(g)]
            size = self.config.prompts_per_forward
            windows = [
                self._windows(mine[i : i + size], context) for i in range(0, len(mine), size)
            ]
            own = sum(agg_divisor(w.keep[w.present], self.config.loss_agg) for w in windows)
            divisor = max(1.0, context.global_sum(own))
            for one in windows:
                one.divisor = divisor
            steps.append(windows)
        return steps

    def updates(self, samples: list[list[Windows]], context: Context) -> Iterator[Update]:
        for _ in range(self.config.epochs):
            for windows in samples:
                yield Update(micros=windows)

    def _update_of(self, group: Group) -> int:
        return self.mini_batches.update_of(group.trajectories[0].group_id)

    def _teaches(self, group: Group) -> bool:
        """Equal rewards leave the divergence alone."""
        return self.config.kl_weight > 0 or len(set(group.rewards.tolist())) > 1

    def _windows(self, groups: Sequence[Group], context: Context) -> Windows:
        window, device = self.rollout.max_new_tokens, context.device
        most = max(len(group.trajectories) for group in groups)
        masked = masked_windows(
            [group.prompt_ids for group in groups],
            [[t.response_ids[:window] for t in group.trajectories] for group in groups],
            policy=self._policy,
            forbid_ids=self.rollout.never_drawn(self._policy.family),
            window=window,
            device=device,
        )
        rows = len(groups) * most
        advantage_R = torch.zeros(rows, dtype=torch.float64)
        base_RL, hint_RL = (torch.zeros(rows, window, dtype=torch.bool) for _ in range(2))
        present_R = torch.zeros(rows, dtype=torch.bool)
        for p, group in enumerate(groups):
            advantage_G = group_advantage(group.rewards, self.config.advantage)
            for g, trajectory in enumerate(group.trajectories):
                row = p * most + g
                present_R[row], advantage_R[row] = True, advantage_G[g]
                base_RL[row, : self._scored(trajectory)] = True
                if trajectory.hint_mask is not None:
                    hint_RL[row, : len(trajectory.hint_mask)] = trajectory.hint_mask[:window]
        made = Windows(
            masked=masked,
            advantage=advantage_R.to(device),
            keep=base_RL,
            hint=hint_RL.to(device),
            present=present_R.to(device),
            old=torch.empty(0),
            reference=None,
        )
        self._score(made, context)
        return made

    def _score(self, made: Windows, context: Context) -> None:
        """Old and reference log-probabilities, and the tokens that enter the loss."""
        with torch.no_grad():
            output = made.masked.score(context.score)
            made.old = _by_rollout(output.logprob, made)
            if self.config.kl_weight:
                made.reference = _by_rollout(self._reference(made.masked, context).logprob, made)
        assert output.entropy is not None
        rows, window = made.keep.shape
        prompts = len(output.entropy) // window
        entropy_PL = output.entropy.view(prompts, window).cpu()
        total = float(entropy_PL.double().sum())
        _add(context.metrics, "policy/entropy", total, float(entropy_PL.numel()))
        hint_RL, keep_RL = made.hint.cpu(), made.keep
        for row in hint_RL.any(1).nonzero()[:, 0].tolist():
            entropy_L = entropy_PL[row * prompts // rows]
            filtered_L = hint_RL[row] & ~kept_hints(entropy_L, hint_RL[row], self.config.hint_keep)
            keep_RL[row] &= ~filtered_L
        numbers = [made.old] if made.reference is None else [made.old, made.reference]
        finite_R = torch.stack([x.isfinite().all(1) for x in numbers]).all(0).cpu()
        keep_RL &= finite_R[:, None]
        made.keep = keep_RL.to(made.old.device)
        _add(context.metrics, "igpo/not_finite", float((~finite_R).sum()), float(rows))
        kept_hint = float((keep_RL & hint_RL).sum())
        _add(context.metrics, "igpo/hint_tokens_kept", kept_hint, float(hint_RL.any(1).sum()))

    def _reference(self, masked: MaskedWindows, context: Context) -> Any:
        if self._start is not None:
            return masked.score(self._start)
        with self._policy.reference():
            return masked.score(context.score)

    def _scored(self, trajectory: Trajectory) -> int:
        """Tokens of a response that may enter the loss."""
        length = trajectory.response_length
        if self.config.scored_tokens == "all":
            return length
        eos_ids = torch.tensor(list(self._policy.family.eos_ids), dtype=torch.int64)
        ends = torch.isin(trajectory.response_ids, eos_ids).nonzero()
        return int(ends[0, 0]) + 1 if ends.numel() else length


def _by_rollout(logprob_NG: Tensor, windows: Windows) -> Tensor:
    """[R, L]: of each rollout, from the columns of its prompt's positions."""
    rows, length = windows.keep.shape
    members = logprob_NG.shape[1]
    return logprob_NG.view(rows // members, length, members).transpose(1, 2).reshape(rows, length)


def _metrics(
    micro: Windows, logprob_RL: Tensor, ratio_RL: Tensor, kl_RL: Tensor, config: Config
) -> Metrics:
    """(sum, count) over the kept tokens, hints and generated ones apart; read in one go."""
    keep_RL, a_R1 = micro.keep, micro.advantage[:, None]
    clipped_RL = (a_R1 > 0) & (ratio_RL > 1 + config.clip_high)
    clipped_RL |= (a_R1 < 0) & (ratio_RL < 1 - config.clip_low)
    parts = {"hint": keep_RL & micro.hint, "generated": keep_RL & ~micro.hint}
    sums = []
    names: list[str] = []
    for part, where_RL in parts.items():
        for name, value_RL in (("ratio_mean", ratio_RL), ("clip_fraction", clipped_RL)):
            names.append(f"policy/{name}_{part}")
            sums += [(value_RL * where_RL).double().sum(), where_RL.double().sum()]
    for name, value_RL in (("policy/kl", kl_RL), ("policy/logprob", logprob_RL)):
        names.append(name)
        finite_RL = torch.where(keep_RL, value_RL.detach().double(), 0.0)
        sums += [finite_RL.sum(), keep_RL.double().sum()]
    numbers = torch.stack(sums).tolist()
    return dict(zip(names, zip(numbers[::2], numbers[1::2], strict=True), strict=True))


def _add(metrics: Metrics, name: str, total: float, count: float) -> None:
    before = metrics.get(name, (0.0, 0.0))
    assert isinstance(before, tuple)
    metrics[name] = (before[0] + total, before[1] + count)
