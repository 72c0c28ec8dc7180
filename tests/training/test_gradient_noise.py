"""Measured gradient noise: against explicit gradients, enumeration, and any split of the work."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from algorithm_toys import context_of, group, make_groups, moved, run, trajectory

import dlm_fast
from dlm_fast.algorithms import bgpo
from dlm_fast.algorithms.advantages import group_advantage
from dlm_fast.ops import Visibility
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.training.gradient_noise import BatchGradient, NoiseConfig, measure, rollouts
from dlm_fast.training.noise_report import report

ROLLOUT = SamplerConfig(max_new_tokens=12, block_size=12, steps=12)
SMALL = NoiseConfig(
    samplers=("l_iid", "coupled"),
    samples=(1, 2, 4),
    repetitions=3,
    group_size=3,
    reference_samples=32,
)


@pytest.fixture(scope="module")
def policy():
    """The built-in model in float64, its weights larger than a new model's."""
    return moved(dlm_fast.load("tiny", dtype="float64", width=16, layers=1, heads=2), size=3)


@pytest.fixture(scope="module")
def measured(policy):
    """The noise on ``make_groups()``, and the cells as they were told."""
    told = []
    found = measure(policy, make_groups(), SMALL, rollout=ROLLOUT, seed=5, progress=told.append)
    return found, told


def batch_of(policy, groups, config=SMALL, seed=5):
    return BatchGradient(policy, groups, config, ROLLOUT, seed)


def flat_grad(batch):
    return torch.cat([p.grad.flatten() for p in batch.parameters]).clone()


def stack(batch, *arguments, **keywords):
    """[responses, repetitions, P]"""
    return torch.stack(
        [
            torch.stack([flat_grad(batch) for _ in repetitions])
            for repetitions in batch.repeat(*arguments, **keywords)
        ]
    )


def test_responses_add_up_to_the_step_of_bgpo(policy):
    """The sum over responses is the gradient that a training step on the batch would see."""
    groups = make_groups()
    batch = batch_of(policy, groups)
    seen = []
    build = bgpo.Config.build

    def spy(config, **setting):
        seen.append(setting["seed"])
        return build(config, **setting)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bgpo.Config, "build", spy)
        found = stack(batch, "coupled", 4, 2, purpose=1).sum(0)
    config = bgpo.Config(num_samples=4, sampler="coupled", group_size=3)
    algorithm = config.build(
        rollout=ROLLOUT, num_prompts=2, mask_id=policy.family.mask_id, seed=seen[0]
    )
    for repetition in range(2):
        context = context_of(policy, iteration=repetition)
        (step,) = run(algorithm, policy, groups, context)
        assert torch.allclose(found[repetition], step.flat, rtol=1e-10, atol=1e-14)
    assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


def test_noise_is_that_of_the_explicit_stack(policy, measured):
    found, _ = measured
    batch = batch_of(policy, make_groups())
    for cell in found.cells:
        gradients = stack(batch, cell.sampler, cell.num_samples, 3, purpose=1)
        assert cell.variance == pytest.approx(gradients.var(1).sum().item(), rel=1e-9)
    parts = stack(batch, "coupled_strat", 4, 8, purpose=0)
    reference = parts.mean(1).sum(0)
    variance = parts.var(1).sum().item() / 8
    assert found.reference_noise == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert found.gradient_norm == pytest.approx(
        math.sqrt(reference.square().sum().item() - variance), rel=1e-9
    )
    away = (gradients.mean(1).sum(0) - reference).square().sum().item()
    assert found.cells[-1].unseen == pytest.approx(cell.variance / 3 + variance, rel=1e-9)
    assert found.cells[-1].bias_squared == pytest.approx(away - cell.unseen, rel=1e-7)


def test_reference_is_the_enumerated_gradient(policy):
    """All 2^3 - 1 masks of three tokens with their weights give the gradient of the ELBO itself."""
    members = [
        trajectory([1, 2], [3, 4, 5], reward=1.0, sequence_id=1),
        trajectory([1, 2], [7, 7, 2], reward=0.0, sequence_id=2),
    ]
    groups = [group(0, members)]
    config = replace(
        SMALL,
        reference_samples=1024,
        repetitions=2,
        samples=(2, 4),
        group_size=2,
        samplers=("l_iid",),
    )
    found = measure(policy, groups, config, rollout=ROLLOUT, seed=0)
    objective = 0.0
    for member, advantage in zip(members, group_advantage(groups[0].rewards), strict=True):
        for size in (1, 2, 3):
            for masked in itertools.combinations(range(3), size):
                rows = torch.tensor(masked) + 2
                ids = member.input_ids.index_fill(0, rows, policy.family.mask_id)
                logp = policy.logits(ids, Visibility.full([5])).log_softmax(-1)
                ell = 3 / size * logp[rows, member.input_ids[rows]].sum()
                share = 1 / (3 * math.comb(3, size))
                objective = objective - advantage / 3 * share * ell / 2
    exact = torch.autograd.grad(objective, list(policy.parameters()), allow_unused=True)
    exact = torch.cat([g.flatten() for g in exact if g is not None])
    assert found.reference_noise < 0.1 * found.gradient_norm
    assert abs(found.gradient_norm - exact.norm().item()) < 3 * found.reference_noise


def test_results_do_not_depend_on_the_split_and_repeat_bit_for_bit(policy):
    groups = make_groups(rewards=((1.0, 0.0),))
    config = replace(
        SMALL, samplers=("coupled",), samples=(2, 4), repetitions=2, reference_samples=16
    )
    whole = measure(policy, groups, config, rollout=ROLLOUT, seed=5)
    again = measure(policy, groups, config, rollout=ROLLOUT, seed=5)
    assert whole == again
    chunked = replace(config, samples_per_forward=1)
    split = measure(policy, groups, chunked, rollout=ROLLOUT, seed=5)
    for one, other in zip(whole.cells, split.cells, strict=True):
        assert one.variance == pytest.approx(other.variance, rel=1e-9)
    assert measure(policy, groups, config, rollout=ROLLOUT, seed=6).cells != whole.cells


def test_samplers_of_pairs_skip_odd_numbers_and_progress_is_told(measured):
    found, told = measured
    assert told == found.cells
    cells = [(cell.sampler, cell.num_samples) for cell in told]
    assert cells == [("l_iid", 1), ("l_iid", 2), ("l_iid", 4), ("coupled", 2), ("coupled", 4)]


def test_only_rollouts_with_an_advantage_count(policy):
    dull = make_groups(rewards=((1.0, 0.0, 0.5), (0.25, 0.25, 0.25)))
    config = replace(SMALL, samplers=("l_iid",), samples=(1, 2), reference_samples=16)
    found = measure(policy, dull, config, rollout=ROLLOUT, seed=5)
    assert found.responses == 2, "the middle reward is the group's mean, the second group is dull"
    with pytest.raises(ValueError, match="every rollout's advantage is 0"):
        measure(policy, make_groups(rewards=((1.0, 1.0),)), SMALL, rollout=ROLLOUT, seed=5)


def test_report_is_relative_to_the_gradient(measured):
    found, _ = measured
    made = report([found, replace(found, seed=6)])
    assert made["baseline"] == "l_iid" and [s["seed"] for s in made["seeds"]] == [5, 6]
    row = made["seeds"][0]["samplers"]["coupled"]["cells"][0]
    noise = math.sqrt(found.of("coupled")[0].variance) / found.gradient_norm
    assert row["noise"][0] == pytest.approx(noise)
    assert row["noise"][1] < noise < row["noise"][2]
    pooled = made["all_seeds"]["coupled"]
    assert pooled["cells"][0]["noise"][0] == pytest.approx(noise)
    assert pooled["slope"][0] == pytest.approx(made["seeds"][0]["samplers"]["coupled"]["slope"][0])
    assert made["all_seeds"]["l_iid"]["ratio"] is None
    alone = report([replace(found, cells=found.of("coupled"))])
    assert alone["baseline"] is None and alone["all_seeds"]["coupled"]["ratio"] is None


def test_rollouts_are_those_of_a_run(tiny_policy):
    task = dlm_fast.tasks.get("sudoku", template="plain", min_empty=8, max_empty=12)
    settings = SamplerConfig(max_new_tokens=4, block_size=4, steps=2, temperature=1.0)
    config = replace(SMALL, prompts=2)
    groups = rollouts(tiny_policy, task, config, rollout=settings, seed=3)
    assert [len(g.trajectories) for g in groups] == [3, 3]
    assert groups[0].task_id != groups[1].task_id
    again = rollouts(tiny_policy, task, config, rollout=settings, seed=3)
    ids = [t.response_ids.tolist() for g in groups for t in g.trajectories]
    assert ids == [t.response_ids.tolist() for g in again for t in g.trajectories]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": (1, 2)}, "sampler coupled needs two numbers of samples for a slope, and"),
        ({"samples": (4, 4)}, "samples must be different from each other"),
        ({"samples": (0, 2, 4)}, "samples must be at least 1, got 0"),
        ({"samplers": ()}, "samplers must be different from each other and at least one"),
        ({"samplers": ("l_idd",)}, "samplers must be of l_strat.*got 'l_idd'"),
        ({"repetitions": 1}, "repetitions must be at least 2, got 1"),
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"samples_per_forward": 0}, "samples_per_forward must be at least 1"),
        ({"reference_samples": 40}, "positive multiple of 16, got 40"),
    ],
)
def test_config_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changed)
