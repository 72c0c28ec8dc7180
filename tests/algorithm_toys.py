"""Small policies, groups and a loop in miniature for the tests of algorithms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from oracles import ContextModel
from torch import Tensor, nn

from dlm_fast.algorithms.bgpo import BGPO, Config
from dlm_fast.algorithms.contract import Algorithm, Context
from dlm_fast.algorithms.elbo import MaskedCopies
from dlm_fast.ops import Visibility
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

MASK_ID = 99


class ToyPolicy(nn.Module):
    """Answers score requests from a function of one copy; counts its forwards."""

    family = SimpleNamespace(kind="full", logit_shift=0)

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def predicting_rows(self, rows: Tensor, visibility: Visibility) -> Tensor:
        return rows

    def logprob(self, ids_S: Tensor, position_M: Tensor) -> Tensor:
        """[M] of the masked tokens of one copy."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, visibility: Visibility, *, score: Any) -> SimpleNamespace:
        self.forwards += 1
        parts, start = [], 0
        for length in visibility.lengths:
            inside = (score.rows >= start) & (score.rows < start + length)
            ids_S = input_ids[start : start + length]
            parts.append(self.logprob(ids_S, score.rows[inside].long() - start))
            start += length
        logprob = torch.cat(parts)
        if score.weights is None:
            return SimpleNamespace(logprob=logprob, objective=None)
        return SimpleNamespace(logprob=logprob.detach(), objective=(score.weights * logprob).sum())


class ContextPolicy(ToyPolicy):
    """The context model of the oracles (O2, O3, O6) behind a prompt of one token."""

    def __init__(self, token_ids: tuple[int, ...], scales: tuple[float, float]) -> None:
        super().__init__()
        self.token_ids = token_ids
        self.scales = nn.Parameter(torch.tensor(scales, dtype=torch.float64))

    def logprob(self, ids_S: Tensor, position_M: Tensor) -> Tensor:
        model = ContextModel(token_ids=self.token_ids, scales=tuple(self.scales))
        masked_L = ids_S[1:] == MASK_ID
        return model.logprob(masked_L)[position_M - 1]


class TablePolicy(ToyPolicy):
    """ell of response r under the mask {j} is a parameter; the prompt token is r."""

    def __init__(self, ell_Rn: Sequence[Sequence[float]], length: int) -> None:
        super().__init__()
        self.length = length
        self.ell_Rn = nn.Parameter(torch.tensor(ell_Rn, dtype=torch.float64))

    def logprob(self, ids_S: Tensor, position_M: Tensor) -> Tensor:
        return self.ell_Rn[ids_S[0], position_M - 1] / self.length


@dataclass
class FixedMasks:
    """Stands where ``Masking`` does: sample j masks the j-th of the given sets (L/l form)."""

    sets: Sequence[Sequence[int]]

    @property
    def num_samples(self) -> int:
        return len(self.sets)

    def num_scored(self, trajectory: Trajectory) -> int:
        return trajectory.response_length

    def draw(self, trajectories: Sequence[Trajectory], first: int, count: int) -> MaskedCopies:
        ids, rows, targets, counts, weights, start = [], [], [], [], [], 0
        for trajectory in trajectories:
            for masked in self.sets[first : first + count]:
                where = torch.tensor(masked) + trajectory.prompt_length
                clean = trajectory.input_ids
                ids.append(clean.index_fill(0, where, MASK_ID))
                rows.append(where + start)
                targets.append(clean[where])
                counts.append(len(masked))
                weights.append(trajectory.response_length / len(masked))
                start += clean.numel()
        many = len(trajectories)
        return MaskedCopies(
            input_ids=torch.cat(ids),
            visibility=Visibility.full([x.numel() for x in ids]),
            rows=torch.cat(rows).to(torch.int32),
            targets=torch.cat(targets),
            counts=torch.tensor(counts),
            weight_K=torch.tensor(weights, dtype=torch.float64),
            response_K=torch.arange(many).repeat_interleave(count),
            sample_K=torch.arange(first, first + count).repeat(many),
        )


def trajectory(
    prompt: Sequence[int], response: Sequence[int], reward: float = 0.0, **fields: Any
) -> Trajectory:
    return Trajectory(
        prompt_ids=torch.tensor(prompt, dtype=torch.int64),
        response_ids=torch.tensor(response, dtype=torch.int64),
        reward=reward,
        **fields,
    )


def group(group_id: int, members: Sequence[Trajectory]) -> Group:
    for index, member in enumerate(members):
        member.group_id, member.member = group_id, index
    return Group(task_id=group_id, prompt_ids=members[0].prompt_ids, trajectories=list(members))


def context_of(policy: nn.Module, **fields: Any) -> Context:
    """A context of one process over ``policy``."""

    def score(input_ids: Tensor, visibility: Any = None, **request: Any) -> Any:
        with torch.no_grad():
            return policy(input_ids, visibility, **request)

    defaults = {"global_sum": float, "iteration": 0, "seed": 0, "micro_batch": 16}
    return Context(score=score, **(defaults | fields))


@dataclass
class UpdateResult:
    """What one optimizer step would have seen."""

    loss: float
    grads: dict[str, Tensor]
    metrics: dict[str, float]
    forwards: int

    @property
    def flat(self) -> Tensor:
        return torch.cat([g.flatten() for g in self.grads.values()])


def run(
    algorithm: Algorithm,
    policy: nn.Module,
    groups: list[Group],
    context: Context | None = None,
    between: Callable[[int], None] = lambda update: None,
) -> list[UpdateResult]:
    """One iteration; ``between(u)`` stands for the optimizer step after update u."""
    algorithm.modules(policy)
    context = context or context_of(policy)
    results = []
    samples = algorithm.prepare(groups, context)
    for index, update in enumerate(algorithm.updates(samples, context)):
        policy.zero_grad()
        loss, sums, forwards = 0.0, {}, 0
        for micro in update.micros:
            value, metrics = (update.loss or algorithm.loss)(micro, policy)
            value.backward()
            loss, forwards = loss + value.item(), forwards + 1
            for name, (total, count) in metrics.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + count)
        results.append(
            UpdateResult(
                loss=loss,
                grads={
                    name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for name, p in policy.named_parameters()
                },
                metrics={n: t / c for n, (t, c) in sums.items() if c},
                forwards=forwards,
            )
        )
        between(index)
    return results


def moved(policy: nn.Module, seed: int = 1, size: float = 0.05) -> nn.Module:
    """The policy a long step later."""
    other = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=size * parameter.std().nan_to_num(0.1).item())
    return other


def make_groups(rewards=((1.0, 0.0, 0.25), (0.0, 0.5, 1.0)), lengths=(12, 9, 5)):
    generator = torch.Generator().manual_seed(0)
    groups = []
    for g, members in enumerate(rewards):
        prompt = torch.randint(0, 90, (3 + g,), generator=generator).tolist()
        rollouts = []
        for i, reward in enumerate(members):
            size = lengths[i % len(lengths)]
            ids = torch.randint(0, 90, (size,), generator=generator).tolist()
            rollouts.append(trajectory(prompt, ids, reward, sequence_id=10 * g + i))
        groups.append(group(g, rollouts))
    return groups


def make_bgpo(policy, num_prompts=2, seed=3, **options) -> BGPO:
    options = {"num_samples": 6, "group_size": 3, "samples_per_forward": 2} | options
    return BGPO(
        Config(**options),
        rollout=SamplerConfig(max_new_tokens=12, block_size=4, steps=12),
        num_prompts=num_prompts,
        mask_id=policy.family.mask_id,
        seed=seed,
    )


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return (a - b).norm().item() <= tolerance * b.norm().item()
