"""The supervised loss against cross-entropy written out, and its normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithm_toys import context_of, group, run, trajectory

import dlm_fast
from dlm_fast.algorithms import ALGORITHMS
from dlm_fast.algorithms.sft import SFT, Config
from dlm_fast.rollout.sampler_config import SamplerConfig


@pytest.fixture(scope="module")
def tiny():
    return dlm_fast.load("tiny", width=16, layers=2, heads=2).double()


def make(policy, seed=2, num_prompts=5, **options) -> SFT:
    return Config(**options).build(
        rollout=SamplerConfig(), num_prompts=num_prompts, mask_id=policy.family.mask_id, seed=seed
    )


def demonstrations(lengths=(4, 9, 6, 1, 9)):
    generator = torch.Generator().manual_seed(0)
    groups = []
    for g, length in enumerate(lengths):
        ids = torch.randint(0, 90, (3 + length,), generator=generator).tolist()
        groups.append(group(g, [trajectory(ids[:3], ids[3:], sequence_id=g)]))
    return groups


def naive(made: SFT, policy, groups):
    total, tokens = 0.0, 0
    for g in groups:
        (t,) = g.trajectories
        masking = made.prepare([g], context_of(policy))[0].masking
        tokens += t.response_length
        for j in range(made.config.num_samples):
            copies = masking.draw([t], j, 1)
            logits = policy.logits(copies.input_ids, copies.visibility)[copies.rows.long()]
            entropy = torch.nn.functional.cross_entropy(logits, copies.targets, reduction="sum")
            total = total + copies.weight_K[0] * entropy / made.config.num_samples
    loss = total / tokens
    gradient = torch.autograd.grad(loss, list(policy.parameters()))
    return loss.item(), torch.cat([x.flatten() for x in gradient])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_samples": 3}, {"sampler": "l_strat", "num_samples": 4, "samples_per_forward": 3}],
)
def test_loss_is_the_weighted_cross_entropy(tiny, options):
    made, groups = make(tiny, **options), demonstrations()
    (result,) = run(made, tiny, groups)
    loss, gradient = naive(made, tiny, groups)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert (result.flat - gradient).norm() <= 1e-12 * gradient.norm()


def test_bernoulli_weights_are_one_over_t(tiny):
    """E[masked tokens / t] = L: the weights of the published sampler are those of its times."""
    made = make(tiny, num_samples=1)
    groups = demonstrations([20] * 300)
    for index, g in enumerate(groups):
        g.trajectories[0].sequence_id = index
    micros = made.prepare(groups, context_of(tiny, micro_batch=300))
    copies = micros[0].draw()
    share_K = copies.counts / 20 * copies.weight_K
    assert (copies.weight_K >= 1).all()
    assert share_K.mean().item() == pytest.approx(1, abs=4 * share_K.std().item() / 300**0.5)


def test_micro_batches_and_ranks_add_up(tiny):
    groups = demonstrations()
    whole = run(make(tiny), tiny, groups)[0]
    parts = run(make(tiny), tiny, groups, context_of(tiny, micro_batch=2))[0]
    assert (whole.forwards, parts.forwards) == (1, 3)
    assert (whole.flat - parts.flat).norm() <= 1e-12 * whole.flat.norm()
    tokens = sum(t.response_length for g in groups for t in g.trajectories)
    ranks = [
        run(make(tiny), tiny, chosen, context_of(tiny, global_sum=lambda x: float(tokens)))[0]
        for chosen in (groups[:2], groups[2:])
    ]
    assert ranks[0].loss + ranks[1].loss == pytest.approx(whole.loss, rel=1e-12)
    assert (ranks[0].flat + ranks[1].flat - whole.flat).norm() <= 1e-12 * whole.flat.norm()


def test_masks_are_new_in_every_iteration(tiny):
    groups = demonstrations()
    losses = {
        run(make(tiny), tiny, groups, context_of(tiny, iteration=i))[0].loss for i in (0, 1, 2)
    }
    assert len(losses) == 3
    again = run(make(tiny), tiny, groups, context_of(tiny, iteration=1))[0]
    assert again.loss in losses


def test_training_on_one_demonstration_learns_it():
    policy = dlm_fast.load("tiny", width=32, layers=1, heads=2)
    made = make(policy, sampler="l_strat", num_samples=8, samples_per_forward=8, num_prompts=1)
    groups = demonstrations([9])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    losses = []
    for iteration in range(40):
        losses.append(run(made, policy, groups, context_of(policy, iteration=iteration))[0].loss)
        optimizer.step()
    assert losses[0] > 4
    assert losses[-1] < 0.6


def test_plan_asks_for_demonstrations(tiny):
    plan = make(tiny, num_prompts=7, fill_to=32).sampling(3)
    assert (plan.num_prompts, plan.group_size, plan.sampler, plan.fill_to) == (7, 1, None, 32)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"fill_to": -1}, {"sampler": "uniform"}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"algorithm.{next(iter(options))}"):
        Config(**options)


def test_table_of_algorithms_builds_each(tiny):
    for name, (config_type, algorithm_type) in ALGORITHMS.items():
        made = config_type().build(
            rollout=SamplerConfig(), num_prompts=4, mask_id=tiny.family.mask_id, seed=0
        )
        assert isinstance(made, algorithm_type)
        assert made.sampling(0).num_prompts == 4
        policy = _causal() if name in ("treepo", "grpo") else copy.deepcopy(tiny)
        assert set(made.modules(policy)) == {"policy"}, name


def _causal():
    return dlm_fast.load("tiny", kind="causal", width=16, layers=1, heads=2)
