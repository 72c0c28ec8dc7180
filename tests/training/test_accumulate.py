"""The gradient of an optimizer step: in place or by autograd, clipped and measured per sample."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from fake_training import ROLLOUT, Config, DigitsTask, tiny_policy
from torch import nn
from train_in_processes import real

from dlm_fast.algorithms import bgpo, sft
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.training import TrainConfig, Trainer
from dlm_fast.training.accumulate import Accumulation
from dlm_fast.training.distributed import Runtime
from dlm_fast.training.metrics import MetricSums

BGPO = bgpo.Config(num_samples=4, samples_per_forward=2, group_size=4)


def trainer(policy=None, algorithm=BGPO, **changes):
    options = {"max_steps": 3, "prompts_per_step": 4, "micro_batch": 2, "lr": 3e-3, "eval_every": 0}
    return Trainer(
        policy or tiny_policy(),
        DigitsTask(),
        algorithm,
        TrainConfig(**options | {"device": "cpu"} | changes),
        rollout=ROLLOUT,
        seed=3,
    )


def steady(history):
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in history
    ]


def tied_policy():
    policy = tiny_policy()
    with torch.no_grad():
        policy.backbone.embed_tokens.weight *= 0.1
    policy.lm_head.weight = policy.backbone.embed_tokens.weight
    return policy


@pytest.mark.parametrize(
    "algorithm, make",
    [
        (BGPO, tiny_policy),
        (bgpo.Config(num_samples=2, group_size=4, mini_batch=8), tiny_policy),
        (sft.Config(num_samples=3, samples_per_forward=1), tiny_policy),
        (Config(), tiny_policy),  # its weights reach the loss with another factor than 1
        (BGPO, tied_policy),
    ],
    ids=["bgpo", "off-policy", "sft", "fake", "tied"],
)
def test_in_place_equals_autograd(algorithm, make):
    """The same metrics over the first steps, gradient norm and loss among them."""
    one, two = (
        trainer(make(), algorithm, head_gradient=kind).run().history
        for kind in ("in_place", "autograd")
    )
    for row, twin in zip(steady(one), steady(two), strict=True):
        assert row["policy/grad_norm"] > 0
        assert row == pytest.approx(twin, rel=1e-5, abs=1e-6)


def gradients_of_one_step(run):
    """Parameters' gradients as the optimizer of the first step sees them."""
    found = {}

    class Stop(Exception):
        pass

    def stop(optimizer, *_):
        found.update({n: p.grad.clone() for n, p in run.policy.named_parameters()})
        raise Stop

    run.trainees["policy"].optimizer.register_step_pre_hook(stop)
    with pytest.raises(Stop):
        run.run()
    return found


def test_bf16_arithmetic_rounds_the_heads_gradient_no_more():
    """Against float32 arithmetic; autograd's own path rounds it to bfloat16 per micro-batch."""
    setting = {"max_grad_norm": 0.0, "micro_batch": 1}
    errors = {}
    truth = gradients_of_one_step(trainer(**setting, precision="fp32"))
    for kind in ("in_place", "autograd"):
        found = gradients_of_one_step(trainer(**setting, precision="bf16", head_gradient=kind))
        assert all(g.dtype == torch.float32 for g in found.values())
        head = "lm_head.weight"
        errors[kind] = float((found[head] - truth[head]).norm() / truth[head].norm())
    assert errors["in_place"] < 1.05 * errors["autograd"] < 0.1


def micro_gradients(run):
    """[K, P] gradients of the first step's micro-batches, each on its own, in float64."""
    samples, context = run._collect(MetricSums())
    rows = []
    for update in run.algorithm.updates(samples, context):
        for micro in update.micros:
            run.policy.zero_grad()
            run.algorithm.loss(micro, run.policy)[0].backward()
            grads = [p.grad.flatten() for p in run.policy.parameters()]
            rows.append(torch.cat(grads).double())
    run.policy.zero_grad()
    return torch.stack(rows)


def test_statistics_of_the_samples():
    stack = micro_gradients(trainer(max_steps=1))
    count = len(stack)
    samples = stack * count  # whose mean is the gradient
    run = trainer(max_steps=1, gradient_statistics=True, max_grad_norm=0.0)
    row = run.run().metrics
    variance, mean = float(samples.var(0).sum()), samples.mean(0)
    expected = {
        "policy/grad_norm": float(mean.norm()),
        "policy/sample_norm": float(samples.norm(dim=1).mean()),
        "policy/sample_norm_max": float(samples.norm(dim=1).max()),
        "policy/sample_variance": variance,
        "policy/noise_scale": variance / float(mean.square().sum()),
    }
    assert count >= 4
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert "policy/sample_clip_fraction" not in row
    plain = trainer(max_steps=1, max_grad_norm=0.0).run().metrics
    assert not any(name.startswith("policy/sample") for name in plain)


def test_clipping_of_the_samples():
    setting = {"micro_batch": 1, "max_grad_norm": 0.0}
    stack = micro_gradients(trainer(max_steps=1, **setting))
    samples = stack * len(stack)
    norms = samples.norm(dim=1)
    limit = float(norms.median())
    clipped = (limit / norms).clamp(max=1)[:, None] * samples
    run = trainer(max_steps=1, per_sample_clip=limit, **setting)
    row = run.run().metrics
    assert row["policy/grad_norm"] == pytest.approx(float(clipped.mean(0).norm()), rel=1e-4)
    assert row["policy/sample_norm_max"] == pytest.approx(float(norms.max()), rel=1e-4)
    assert row["policy/sample_variance"] == pytest.approx(float(clipped.var(0).sum()), rel=1e-4)
    assert 0.3 < row["policy/sample_clip_fraction"] < 0.6


def test_16_bit_weights_sum_in_32_bits():
    """Their own .grad rounds after each micro-batch; the main gradient rounds once."""

    def run():
        setting = {"micro_batch": 1, "lr": 1e-3, "head_gradient": "autograd"}
        return trainer(tiny_policy(dtype="bfloat16"), **setting, max_grad_norm=0.0)

    ours = gradients_of_one_step(run())
    exact = micro_gradients(run()).sum(0)
    assert all(g.dtype == torch.bfloat16 for g in ours.values())
    ours = torch.cat([g.flatten() for g in ours.values()]).double()
    assert bool(((ours - exact).abs() <= 2.0**-8 * exact.abs() + 1e-12).all())
    naive = torch.zeros_like(exact).bfloat16()
    for row in micro_gradients(run()):
        naive += row.bfloat16()
    assert float((naive - exact).norm()) > 1.5 * float((ours - exact).norm())


def test_a_bad_step_leaves_nothing_behind():
    """NaN in the sum of one step must not reach the next."""
    run = trainer(algorithm=Config(poison_from=None), max_steps=1)
    clean = run.run().metrics["policy/grad_norm"]
    run = trainer(max_steps=2)
    loss = run.algorithm.loss
    poisoned = []

    def poison_first_step(micro, forward):
        value, metrics = loss(micro, forward)
        if run.step == 0:
            run.stepper._accumulations["policy"]._sum.main_grads[0].fill_(math.nan)
            poisoned.append(micro)
        return value, metrics

    run.algorithm.loss = poison_first_step
    first, second = run.run().history
    assert poisoned and first["train/bad_steps"] == second["train/bad_steps"] == 1
    assert math.isfinite(second["policy/grad_norm"]) and math.isfinite(clean)


def policy_step(policy, weights_scale, use=True, **request):
    """A step whose loss is scale * objective, as an algorithm outside might write it."""
    config = TrainConfig(device="cpu")
    accumulation = Accumulation(policy, config, Runtime(device="cpu"))
    rows, targets = torch.arange(4, dtype=torch.int32), torch.tensor([1, 2, 3, 4])
    score = ScoreRequest(rows, targets, weights=torch.ones(4), **request)
    with accumulation.step(1):
        objective = policy(torch.tensor([[5, 6, 7, 8]]), score=score).objective
        other = policy(torch.tensor([[5, 6, 7, 8]]), logits=True).sum()
        (weights_scale * objective if use else other).backward()
        accumulation.add()
    accumulation.finish()
    return policy.lm_head.weight.grad


def test_a_term_that_enters_the_loss_otherwise_is_refused():
    assert policy_step(tiny_policy(), 1.0, in_loss=True).abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"is -1, not 1"):
        policy_step(tiny_policy(), -1.0, in_loss=True)
    with pytest.raises(RuntimeError, match="the loss does not contain"):
        policy_step(tiny_policy(), 1.0, use=False, in_loss=True)
    policy = tiny_policy()
    negative = policy_step(policy, -1.0)  # without in_loss autograd takes care
    assert torch.allclose(negative, -policy_step(tiny_policy(), 1.0, in_loss=True), atol=1e-6)
    assert policy.lm_head.gradient is None


def test_no_gradient_is_added_without_a_backward_pass():
    policy = tiny_policy()
    accumulation = Accumulation(policy, TrainConfig(device="cpu"), Runtime(device="cpu"))
    score = ScoreRequest(
        torch.arange(2, dtype=torch.int32),
        torch.tensor([1, 2]),
        weights=torch.ones(2),
        in_loss=True,
    )
    with accumulation.step(1), torch.no_grad():
        policy(torch.tensor([[5, 6]]), score=score)
    accumulation.finish()
    assert policy.lm_head.weight.grad is None


def test_frozen_head():
    policy = tiny_policy()
    policy.lm_head.weight.requires_grad_(False)
    trained = trainer(policy).run()
    assert trained.metrics["policy/grad_norm"] > 0


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"needs train\.micro_batch=1, got 2"):
        TrainConfig(per_sample_clip=1.0, micro_batch=2)
    with pytest.raises(ValueError, match=r"train\.per_sample_clip must be 0 or more"):
        TrainConfig(per_sample_clip=-1.0, micro_batch=1)
    with pytest.raises(ValueError, match=r"train\.head_gradient must be one of"):
        TrainConfig(head_gradient="else")
    sharded = SimpleNamespace(is_sharded=True, world=2)
    for options in ({"gradient_statistics": True}, {"per_sample_clip": 1.0, "micro_batch": 1}):
        with pytest.raises(ValueError, match="FSDP2 shards them"):
            Accumulation(nn.Linear(2, 2), TrainConfig(**options), sharded)
    Accumulation(nn.Linear(2, 2), TrainConfig(), sharded)  # in_place gives way


def test_resumable_metrics_of_the_shared_setting():
    """What the tests on several processes compare with: statistics of single rollouts."""
    row = real(None, {"gradient_statistics": True, "micro_batch": 1}).run().metrics
    assert (
        row["policy/noise_scale"] > 0 and row["policy/sample_norm"] <= row["policy/sample_norm_max"]
    )
