"""GRPO of diffusion models whose responses are scored from one state: all of them masked.

    d_ik = log p(o_ik | q) - log p_old(o_ik | q)         from [q; mask, mask, ...]
    rho  = exp(d) of tokens, or of a response's mean over the kept tokens
    J    = average over kept tokens of  min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL(ref)

The state does not depend on the response: rollouts of a prompt share one forward (``mean_field``).
IGPO and diffu-GRPO are built on it; what they add is in their files. Sources: d1, arXiv 2504.12216;
IGPO, arXiv 2509.10396.

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
    SamplingPlan,
    TrainedModule,
    Update,
)
from dlm_fast.algorithms.group_ratio import agg_divisor, averaged, divergence, objective
from dlm_fast.algorithms.mean_field import MaskedWindows, masked_windows
from dlm_fast.algorithms.mean_field_options import MeanFieldOptions
from dlm_fast.algorithms.mini_batches import MiniBatches
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory


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


class MeanFieldGRPO(Algorithm):
    """See the module's text. ``modules`` comes first: the policy's family shapes the requests."""

    def __init__(
        self,
        config: MeanFieldOptions,
        *,
        rollout: SamplerConfig,
        num_prompts: int,
        mask_id: int,
        seed: int,
    ) -> None:
        self.config, self.rollout = config, rollout
        self.num_prompts, self.mask_id, self.seed = num_prompts, mask_id, seed
        self.mini_batches = MiniBatches(
            num_prompts=num_prompts, group_size=config.group_size, mini_batch=config.mini_batch
        )
        self._policy: Any = None
        self._start: nn.Module | None = None

    def loss(self, micro: Windows, forward: Callable[..., Any]) -> tuple[Tensor, Metrics]:
        """Minus the objective over the rollouts of some prompts."""
        config, keep_RL = self.config, micro.keep
        output = micro.masked.score(forward)
        logprob_RL = self.by_rollout(output.logprob, micro)
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
        )

    def prepare(self, groups: list[Group], context: Context) -> list[list[list[Windows]]]:
        """By epoch, where their states differ, and optimizer step: windows with old and reference
        log-probabilities."""
        return [self._steps(groups, context, epoch) for epoch in range(self.different_epochs)]

    def updates(self, samples: list[list[list[Windows]]], context: Context) -> Iterator[Update]:
        for epoch in range(self.config.epochs):
            for windows in samples[epoch % len(samples)]:
                yield Update(micros=windows)

    @property
    def different_epochs(self) -> int:
        """Epochs whose states differ from each other."""
        return 1

    def hidden_prompt(self, group: Group, context: Context, epoch: int) -> Tensor:
        """bool [P], prompt tokens that are masked too."""
        return torch.zeros(len(group.prompt_ids), dtype=torch.bool)

    def masked(self, groups: Sequence[Group], context: Context, epoch: int) -> MaskedWindows:
        """The states of some prompts and the tokens of their rollouts."""
        window = self.rollout.max_new_tokens
        return masked_windows(
            [group.prompt_ids for group in groups],
            [[t.response_ids[:window] for t in group.trajectories] for group in groups],
            policy=self._policy,
            forbid_ids=self.rollout.never_drawn(self._policy.family),
            window=window,
            device=context.device,
            hidden_prompt=[self.hidden_prompt(group, context, epoch) for group in groups],
        )

    def by_rollout(self, logprob_NG: Tensor, windows: Windows) -> Tensor:
        """[R, L]: of each rollout, from the columns of its prompt's positions."""
        rows, length = windows.keep.shape
        count = logprob_NG.shape[1]
        return logprob_NG.view(rows // count, length, count).transpose(1, 2).reshape(rows, length)

    def filtered_hints(self, entropy_L: Tensor, hint_L: Tensor) -> Tensor:
        """bool [L], given tokens of a rollout that leave the loss."""
        return torch.zeros_like(hint_L)

    def _steps(self, groups: list[Group], context: Context, epoch: int) -> list[list[Windows]]:
        steps = []
        for update in range(self.mini_batches.num_updates):
            mine = [g for g in groups if self._update_of(g) == update and self._teaches(g)]
            size = self.config.prompts_per_forward
            windows = [
                self._windows(mine[i : i + size], context, epoch) for i in range(0, len(mine), size)
            ]
            own = sum(agg_divisor(w.keep[w.present], self.config.loss_agg) for w in windows)
            divisor = max(1.0, context.global_sum(own))
            for one in windows:
                one.divisor = divisor
            steps.append(windows)
        return steps

    def _update_of(self, group: Group) -> int:
        return self.mini_batches.update_of(group.trajectories[0].group_id)

    def _teaches(self, group: Group) -> bool:
        """Equal rewards leave the divergence alone."""
        return self.config.kl_weight > 0 or len(set(group.rewards.tolist())) > 1

    def _windows(self, groups: Sequence[Group], context: Context, epoch: int) -> Windows:
        window, device = self.rollout.max_new_tokens, context.device
        most = max(len(group.trajectories) for group in groups)
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
            masked=self.masked(groups, context, epoch),
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
            made.old = self.by_rollout(output.logprob, made)
            if self.config.kl_weight:
                start = self._reference(made.masked, context)
                made.reference = self.by_rollout(start.logprob, made)
        assert output.entropy is not None
        rows, window = made.keep.shape
        prompts = rows // made.masked.targets.shape[1]
        entropy_PL = output.entropy[: prompts * window].view(prompts, window).cpu()
        total = float(entropy_PL.double().sum())
        _add(context.metrics, "policy/entropy", total, float(entropy_PL.numel()))
        hint_RL, keep_RL = made.hint.cpu(), made.keep
        for row in hint_RL.any(1).nonzero()[:, 0].tolist():
            entropy_L = entropy_PL[row * prompts // rows]
            keep_RL[row] &= ~self.filtered_hints(entropy_L, hint_RL[row])
        numbers = [made.old] if made.reference is None else [made.old, made.reference]
        finite_R = torch.stack([x.isfinite().all(1) for x in numbers]).all(0).cpu()
        keep_RL &= finite_R[:, None]
        made.keep = keep_RL.to(made.old.device)
        _add(context.metrics, "policy/not_finite", float((~finite_R).sum()), float(rows))
        hinted = float(hint_RL.any(1).sum())
        _add(context.metrics, "policy/hint_tokens", float((keep_RL & hint_RL).sum()), hinted)

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


def _metrics(
    micro: Windows, logprob_RL: Tensor, ratio_RL: Tensor, kl_RL: Tensor, config: MeanFieldOptions
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
