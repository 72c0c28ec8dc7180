"""TraceRL end to end without the training loop: a tiny block model learns two symbols."""

from __future__ import annotations

import copy

import pytest
import torch
from trace_toys import context

import dlm_fast
from dlm_fast.algorithms.contract import Context
from dlm_fast.algorithms.tracerl import Config
from dlm_fast.rollout import sample
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group

TARGET = torch.tensor([3, 5, 5, 3, 3, 5, 3, 5])
GROUP = 32


@pytest.fixture(scope="module")
def start():
    options = {"kind": "block", "block_size": 4, "width": 32, "layers": 1, "heads": 2}
    return dlm_fast.load("tiny", learned_positions=True, **options)


def two_symbols(policy):
    """Rollouts of the two symbols alone."""
    others = [i for i in range(policy.family.vocab_size) if i not in TARGET]
    return SamplerConfig(
        max_new_tokens=8,
        block_size=4,
        steps=8,
        temperature=1.0,
        early_stop=False,
        forbid_ids=tuple(others),
    )


def train(policy, iterations, shuffled=False, **options):
    """Mean reward of every iteration: the share of positions that hold the target's symbol."""
    policy, rollout = copy.deepcopy(policy), two_symbols(policy)
    made = Config(group_size=GROUP, **options).build(
        rollout=rollout, num_prompts=1, mask_id=policy.family.mask_id, seed=0
    )
    _, modules = context(made, policy)
    optimizers = {
        name: torch.optim.AdamW(module.parameters(), lr=3e-3) for name, module in modules.items()
    }
    generator, curve = torch.Generator().manual_seed(0), []

    def score(*inputs, module="policy", **requests):
        with torch.no_grad():
            return modules[module](*inputs, **requests)

    prompt = torch.tensor([7, 7, 7])
    for iteration in range(iterations):
        ids = [1000 * iteration + i for i in range(GROUP)]
        plan = made.sampling(iteration)
        rollouts = sample(policy, [prompt] * GROUP, plan.sampler, seed=0, sequence_ids=ids)
        rewards = [(t.response_ids == TARGET).double().mean().item() for t in rollouts]
        curve.append(sum(rewards) / GROUP)
        order = torch.randperm(GROUP, generator=generator) if shuffled else torch.arange(GROUP)
        for trajectory, i in zip(rollouts, order.tolist(), strict=True):
            trajectory.reward = rewards[i]
        groups = [Group(task_id=0, prompt_ids=prompt, trajectories=rollouts)]
        about = Context(score=score, global_sum=lambda x: x, iteration=iteration, seed=0)
        for update in made.updates(made.prepare(groups, about), about):
            loss_of = update.loss or made.loss
            loss = sum(loss_of(tokens, modules[update.module])[0] for tokens in update.micros)
            loss.backward()
            optimizers[update.module].step()
            optimizers[update.module].zero_grad()
    return curve


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shrink": 2, "epochs": 2},
        {"value": "own"},
        {"value": "shared"},
        {"estimator": "coupled", "num_masks": 2},
        {"schedule": ("iterations=12,train_block_size=8", "block_size=8")},
    ],
    ids=str,
)
def test_rewards_rise(start, options):
    curve = train(start, 35, **options)
    assert curve[0] < 0.6 and sum(curve[-5:]) / 5 > 0.9


def test_shuffled_rewards_teach_nothing(start):
    curve = train(start, 35, shuffled=True)
    assert sum(curve[-5:]) / 5 < 0.75
