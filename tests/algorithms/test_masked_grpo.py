"""The baselines diffu-GRPO and coupled-GRPO against one forward per rollout and state."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from trace_toys import context

import dlm_fast
from dlm_fast.algorithms import coupled_grpo, diffu_grpo
from dlm_fast.algorithms.coupled_grpo import CoupledGRPO
from dlm_fast.algorithms.igpo import Config as IGPO
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

CONFIGS = {"diffu": diffu_grpo.Config, "coupled": coupled_grpo.Config}
EPOCHS = 3


def tiny(**options):
    sizes = {"width": 16, "layers": 2, "heads": 2, "seed": 2}
    return dlm_fast.load("tiny", **(sizes | options)).double()


def build(config, policy):
    rollout = SamplerConfig(max_new_tokens=10, block_size=5, steps=5, temperature=1.0)
    return config.build(rollout=rollout, num_prompts=2, mask_id=policy.family.mask_id, seed=5)


def rollouts(policy):
    """Two groups of three; responses end at different places."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for p in range(2):
        members = []
        for g in range(3):
            ids = torch.randint(3, 60, (10,), generator=generator)
            ids[6 + g + p :] = policy.family.eos_ids[0]
            members.append(
                Trajectory(
                    prompt_ids=torch.arange(3, 10 + p),
                    response_ids=ids,
                    group_id=p,
                    sequence_id=7 * p + g,
                    reward=float(g == 1) + 0.5 * p * (g == 2),
                )
            )
        groups.append(Group(task_id=p, prompt_ids=members[0].prompt_ids, trajectories=members))
    return groups


def logprob(policy, prompt, state, response, never):
    """[10] of one response in one state, a forward by itself."""
    ids = torch.cat([prompt, state])
    visibility = Visibility.full([len(ids)])
    rows = torch.arange(len(prompt), len(ids), dtype=torch.int32)
    request = ScoreRequest(policy.predicting_rows(rows, visibility), response, forbid_ids=never)
    return policy(ids, visibility, score=request).logprob


def score(kind, algorithm, policy, group, t, made, epoch):
    mask_id = policy.family.mask_id
    never = algorithm.rollout.never_drawn(policy.family)
    nothing = torch.full_like(t.response_ids, mask_id)
    if kind == "diffu":
        prompt = t.prompt_ids.clone()
        prompt[algorithm.hidden_prompt(group, made, epoch)] = mask_id
        return logprob(policy, prompt, nothing, t.response_ids, never)
    chosen, rho = algorithm._set(t.sequence_id, 10, made, epoch)
    a = logprob(policy, t.prompt_ids, nothing, t.response_ids, never)
    states = [t.response_ids.masked_fill(s, mask_id) for s in (chosen, ~chosen)]
    b, c = (logprob(policy, t.prompt_ids, s, t.response_ids, never) for s in states)
    return 0.5 * (a + torch.where(chosen, b / rho, c / (1 - rho)))


def definition(kind, algorithm, policy, old, start, groups, made, epoch):
    """Token-level clipped GRPO, in loops."""
    config, total, count = algorithm.config, 0.0, 0
    for group in groups:
        rewards = group.rewards
        others = (rewards.sum() - rewards) / (len(rewards) - 1)
        advantages = rewards - (rewards.mean() if kind == "diffu" else others)
        for t, advantage in zip(group.trajectories, advantages, strict=True):
            ends = (t.response_ids == policy.family.eos_ids[0]).nonzero()
            length = int(ends[0, 0]) + 1 if len(ends) else len(t.response_ids)
            new, before, first = (
                score(kind, algorithm, model, group, t, made, epoch)
                for model in (policy, old, start)
            )
            for k in range(length):
                ratio = (new[k] - before[k].detach()).exp()
                clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                gain = torch.minimum(ratio * advantage, clipped * advantage)
                d = new[k] - first[k].detach()
                total = total + config.kl_weight * ((-d).exp() - 1 + d) - gain
                count += 1
    return total / count


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_equal_their_definition(kind, shift):
    """Values and gradients in a later pass, with other weights than the old and the first ones."""
    policy = tiny(logit_shift=shift)
    config = CONFIGS[kind](group_size=3, epochs=EPOCHS, prompts_per_forward=2, kl_weight=0.3)
    algorithm = build(config, policy)
    start = copy.deepcopy(policy)
    made, _ = context(algorithm, policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape).double())
    old, groups = copy.deepcopy(policy), rollouts(policy)
    samples = algorithm.prepare(groups, made)
    assert len(samples) == EPOCHS
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape).double())
    updates = list(algorithm.updates(samples, made))
    assert len(updates) == EPOCHS
    (micro,) = updates[2].micros
    loss, _ = algorithm.loss(micro, policy)
    expected = definition(kind, algorithm, policy, old, start, groups, made, 2)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    parameters = list(policy.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    truth = torch.autograd.grad(expected, parameters, allow_unused=True)
    for a, b in zip(found, truth, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_masks_change_from_pass_to_pass_and_belong_to_their_prompt():
    policy = tiny()
    algorithm = build(diffu_grpo.Config(group_size=3, prompt_mask=0.5), policy)
    made, _ = context(algorithm, policy)
    groups = rollouts(policy)
    masks = [algorithm.hidden_prompt(groups[0], made, epoch) for epoch in range(8)]
    assert len({tuple(m.tolist()) for m in masks}) > 4
    assert torch.equal(masks[0], algorithm.hidden_prompt(groups[0], made, 0))
    plain = build(diffu_grpo.Config(group_size=3, prompt_mask=0.0), policy)
    assert plain.different_epochs == 1


def test_without_prompt_masks_it_is_grpo_of_tokens():
    policy = tiny()
    groups = rollouts(policy)
    common = {"group_size": 3, "kl_weight": 0.1, "epochs": 1, "clip_low": 0.5, "clip_high": 0.5}
    diffu = diffu_grpo.Config(prompt_mask=0.0, **common)
    token = {"ratio_level": "token", "loss_agg": "token_mean", "guidance": "none"}
    losses = []
    for config in (diffu, IGPO(**common, **token)):
        algorithm = build(config, policy)
        made, _ = context(algorithm, policy)
        (((micro,),),) = algorithm.prepare(groups, made)
        losses.append(algorithm.loss(micro, policy)[0].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_the_published_score():
    """rho = 0.4 and log-probabilities -1.2 (all masked), -0.9 (in S), -0.7 (not in S)."""
    windows = SimpleNamespace(keep=torch.ones(1, 2).bool(), masked=None)
    windows.masked = coupled_grpo.CoupledWindows(
        input_ids=torch.zeros(0),
        visibility=None,
        rows=torch.zeros(0),
        targets=torch.zeros(0),
        place=torch.tensor([0, 1]),
        weight=torch.tensor([1 / 0.4, 1 / 0.6]).double(),
    )
    logprob_NG = torch.tensor([[-1.2], [-1.2], [-0.9], [-0.7]]).double()
    algorithm = object.__new__(CoupledGRPO)
    found = algorithm.by_rollout(logprob_NG, windows)
    assert found[0].tolist() == pytest.approx([-1.725, -1.183333333], abs=1e-8)


def test_sets_have_their_rate():
    """|S| is rho of the tokens on average, and rho is uniform between its bounds."""
    policy = tiny()
    algorithm = build(coupled_grpo.Config(group_size=3), policy)
    made, _ = context(algorithm, policy)
    drawn = [algorithm._set(name, 200, made, 0) for name in range(400)]
    rates = torch.tensor([rho for _, rho in drawn])
    sizes = torch.tensor([s.double().mean().item() for s, _ in drawn])
    assert rates.min() >= 0.2 and rates.max() <= 0.8
    assert rates.mean().item() == pytest.approx(0.5, abs=4 * 0.173 / 20)
    assert (sizes - rates).abs().max() < 5 * 0.5 / 200**0.5


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("diffu", {"prompt_mask": 1.5}, "algorithm.prompt_mask"),
        ("diffu", {"group_size": 1}, "at least 2"),
        ("coupled", {"rho_low": 0.9}, "algorithm.rho_low"),
        ("coupled", {"rho_high": 1.0}, "algorithm.rho_high"),
        ("coupled", {"epochs": 0}, "algorithm.epochs"),
    ],
)
def test_wrong_options(kind, options, words):
    with pytest.raises(ValueError, match=words):
        CONFIGS[kind](**options)
