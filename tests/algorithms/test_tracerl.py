"""TraceRL on tiny models: losses against the formula, updates, value model, options."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trace_toys import MASK, build, context, sampled_groups, sampler, tiny

from dlm_fast.algorithms.advantages import group_advantage
from dlm_fast.algorithms.tracerl import Config
from dlm_fast.models.requests import ScoreRequest


def reference_loss(policy, samples, config):
    """The objective, token by token, from the log-probabilities of the same rows."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in samples:
        rows = tokens.rows
        request = ScoreRequest(
            policy.predicting_rows(rows.rows, rows.visibility),
            rows.targets,
            forbid_ids=(policy.family.mask_id, *policy.family.unused_ids),
        )
        logprob = policy(rows.input_ids, rows.visibility, score=request).logprob
        old = logprob.detach() if tokens.old is None else tokens.old
        for u in range(logprob.numel()):
            d, a = logprob[u] - old[u], tokens.advantage[u]
            gain = torch.minimum(d.exp() * a, d.exp().clamp(0.8, 1.2) * a)
            kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[config.kl]
            term = config.kl_weight * kl - gain
            total = total + tokens.share[u] / tokens.divisor * term
    return total


@pytest.mark.parametrize("kind", ["full", "block"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("agg", ["token_mean", "step_mean", "slice_len"])
def test_losses_equal_the_formula(kind, kl, agg):
    """First step (old = new, weights known before the forward) and a later one, with gradients."""
    policy = tiny(kind)
    options = {"kl": kl, "kl_weight": 0.3, "loss_agg": agg, "mini_batch": 4}
    algorithm = build(policy, **options)
    made, _ = context(algorithm, policy)
    samples = algorithm.prepare(sampled_groups(policy), made)
    assert [s[0].old is None for s in samples.policy] == [True, False]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for step in samples.policy:
        losses = [algorithm.loss(tokens, policy)[0] for tokens in step]
        parameters = [p for p in policy.parameters() if p.requires_grad]
        ours = torch.autograd.grad(sum(losses), parameters, allow_unused=True)
        truth = reference_loss(policy, step, algorithm.config)
        theirs = torch.autograd.grad(truth, parameters, allow_unused=True)
        assert float(sum(losses).detach()) == pytest.approx(float(truth.detach()), abs=1e-9)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-9)


def test_first_step_is_the_policy_gradient():
    """At rho = 1 under token_mean the loss is minus the mean advantage."""
    policy = tiny("block")
    algorithm = build(policy)
    made, _ = context(algorithm, policy)
    (step,) = algorithm.prepare(sampled_groups(policy), made).policy
    loss, metrics = algorithm.loss(step[0], policy)
    advantage = torch.cat([tokens.advantage for tokens in step])
    assert len(step) == 1 and float(loss.detach()) == pytest.approx(-float(advantage.mean()))
    assert (
        metrics["policy/kl"][0] == 0
        and metrics["policy/ratio_mean"] == (float(advantage.numel()),) * 2
    )


@pytest.mark.parametrize("agg", ["token_mean", "seq_mean_len", "step_mean", "slice_mean"])
def test_packing_changes_nothing(agg):
    policy = tiny("block")
    groups = sampled_groups(policy)
    gradients = []
    for budget in (1, 60, 10_000):
        algorithm = build(policy, rows_per_forward=budget, loss_agg=agg)
        made, _ = context(algorithm, policy)
        (step,) = algorithm.prepare(groups, made).policy
        loss = sum(algorithm.loss(tokens, policy)[0] for tokens in step)
        gradients.append(torch.autograd.grad(loss, policy.lm_head.weight)[0])
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    assert torch.allclose(gradients[0], gradients[2], atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "block"])
def test_rescored_rollouts_agree_with_what_decoding_recorded(kind):
    """T5e: the trace replays the states of the rollout, so log-probabilities are the same."""
    policy = tiny(kind)
    algorithm = build(policy, old_logprob="decoupled", kl_weight=0.0)
    made, _ = context(algorithm, policy)
    groups = sampled_groups(policy)
    (step,) = algorithm.prepare(groups, made).policy
    for tokens in step:
        assert torch.allclose(tokens.old, tokens.rollout, atol=1e-5)
        _, metrics = algorithm.loss(tokens, policy)
        assert metrics["trace/mismatch_largest"] < 1e-5
        tokens.rollout = tokens.old - math.log(1.5)
        bare = algorithm.loss(tokens, policy)[0]
        tokens.rollout = tokens.old - math.log(9.0)  # beyond the cap
        assert float(algorithm.loss(tokens, policy)[0].detach()) == pytest.approx(
            float(bare.detach()) / 1.5 * 2
        )


def test_rollout_log_probabilities_as_the_old_ones():
    policy = tiny("block")
    algorithm = build(policy, old_logprob="rollout")
    made, _ = context(algorithm, policy)
    (step,) = algorithm.prepare(sampled_groups(policy), made).policy
    assert all(tokens.old is tokens.rollout for tokens in step)


# --- value model


@pytest.mark.parametrize("value", ["own", "shared"])
def test_a_fresh_value_model_changes_nothing(value):
    """T14: a zero head with gamma = lambda = 1 gives every token the response's advantage."""
    policy = tiny("block")
    groups = sampled_groups(policy)
    with_value, without = build(policy, value=value), build(policy)
    tokens = []
    for algorithm in (with_value, without):
        made, _ = context(algorithm, policy)
        samples = algorithm.prepare(groups, made)
        tokens.append(samples.policy[0])
    for a, b in zip(*tokens, strict=True):
        assert torch.allclose(a.advantage, b.advantage)
        assert (a.old_value == 0).all() and torch.allclose(a.returns, b.advantage)


def test_values_are_learnt():
    policy = tiny("block").float()
    algorithm = build(policy, value="own", value_epochs=30, value_pretraining=1, value_clip=1.0)
    made, modules = context(algorithm, policy)
    samples = algorithm.prepare(sampled_groups(policy), made)
    assert samples.policy == []  # the first iteration trains the value model alone
    optimizer = torch.optim.Adam(modules["value"].parameters(), lr=1e-2)
    losses = []
    for update in algorithm.updates(samples, made):
        assert update.module == "value"
        optimizer.zero_grad()
        loss = sum(update.loss(tokens, modules["value"])[0] for tokens in update.micros)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    again, modules = made, modules
    algorithm.prepare(sampled_groups(policy), again)
    assert made.metrics["value/explained_variance"] > 0.3
    idle = modules["value"](idle=True)
    idle.backward()
    assert all(p.grad is not None for p in modules["value"].parameters())


@pytest.mark.parametrize("kind", ["block", "full"])
def test_a_shared_value_head_learns_what_the_features_say(kind):
    """Returns that are linear in the policy's hidden states; the policy stays as it was."""
    policy = tiny(kind)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    algorithm = build(policy, value="shared", value_epochs=150, value_clip=1e6)
    made, modules = context(algorithm, policy)
    samples = algorithm.prepare(sampled_groups(policy), made)
    direction = torch.linspace(-1, 1, policy.config.hidden_size, dtype=torch.float64)
    for tokens in samples.value:
        rows = tokens.rows
        with torch.no_grad():
            expected = policy(rows.input_ids, rows.visibility, hidden=rows.rows)
        assert torch.equal(tokens.hidden, expected)
        tokens.returns = tokens.hidden @ direction
    optimizer = torch.optim.Adam(modules["value"].parameters(), lr=0.05)
    losses = []
    for update in algorithm.updates(samples, made):
        if update.module == "policy":
            break
        optimizer.zero_grad()
        loss = sum(update.loss(tokens, modules["value"])[0] for tokens in update.micros)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(losses) == 150 and losses[-1] < 0.01 * losses[0]
    assert all(torch.equal(t, before[name]) for name, t in policy.state_dict().items())
    modules["value"](idle=True).backward()
    with pytest.raises(ValueError, match="needs hidden states"):
        modules["value"]()


def test_token_rewards():
    """A task's rewards of single tokens become discounted returns, without a value model."""
    policy = tiny("block")
    groups = sampled_groups(policy, prompts=1)
    for trajectory in groups[0].trajectories:
        trajectory.detail["token_rewards"] = [1.0] * trajectory.response_length
    algorithm = build(policy, num_prompts=1, gamma=1.0)
    made, _ = context(algorithm, policy)
    (step,) = algorithm.prepare(groups, made).policy
    rows = step[0].rows
    for response in range(4):
        own = rows.response == response
        steps = rows.step[own].unique().tolist()
        for step_number, advantage in zip(
            rows.step[own].tolist(), step[0].advantage[own].tolist(), strict=True
        ):
            assert advantage == pytest.approx(len(steps) - steps.index(step_number))
    groups[0].trajectories[0].detail["token_rewards"] = [math.nan]
    with pytest.raises(ValueError, match="finite numbers"):
        algorithm.prepare(groups, made)


# --- groups, options


def test_groups_outside_the_window_are_dropped():
    """Oracle T10: by counts, so that 8 of 10 stays under 0.8."""
    policy = tiny("block")
    algorithm = build(policy, num_prompts=1, group_size=10, drop_below=0.2, drop_above=0.8)
    for correct, kept in ((8, True), (2, True), (9, False), (1, False)):
        groups = sampled_groups(policy, prompts=1, size=10)
        for i, trajectory in enumerate(groups[0].trajectories):
            trajectory.correct, trajectory.reward = i < correct, float(i < correct)
        made, _ = context(algorithm, policy)
        (step,) = algorithm.prepare(groups, made).policy
        assert bool(step) == kept
        assert made.metrics["trace/dropped_groups"] == (0.0 if kept else 1.0, 1.0)


def test_overlong_responses_are_wrong():
    """By the tokens up to the end of text, not by those that fill the window."""
    policy = tiny("block")
    algorithm = build(policy, num_prompts=1, overlong=5)  # of 12 tokens: 7 are too many
    groups = sampled_groups(policy, prompts=1)
    eos = policy.family.eos_ids[0]
    for trajectory, length in zip(groups[0].trajectories, (6, 7, 12, 3), strict=True):
        trajectory.response_ids[trajectory.response_ids == eos] = 9
        trajectory.response_ids[length - 1 :] = eos if length < 12 else 9
        trajectory.reward, trajectory.correct = 1.0, True
    made, _ = context(algorithm, policy)
    algorithm.prepare(groups, made)
    assert groups[0].rewards.tolist() == [1, 0, 0, 1]
    assert [t.correct for t in groups[0].trajectories] == [True, False, False, True]
    assert made.metrics["trace/overlong"] == (2.0, 4.0)


def test_population_z_scores():
    z = group_advantage([1, 0, 0, 1, 1, 0, 0, 0], "zscore")
    assert z[0] == pytest.approx(1.290994, abs=1e-6) and z[1] == pytest.approx(-0.774597, abs=1e-6)
    passes = group_advantage([3, 0, 5, 5], "zscore")
    assert passes.tolist() == pytest.approx([-0.122169, -1.588203, 0.855186, 0.855186], abs=1e-6)
    assert torch.allclose(passes, group_advantage([0.6, 0, 1, 1], "zscore"))
    assert group_advantage([2, 2], "zscore").tolist() == [0, 0]


def test_causal_models_are_refused():
    policy = SimpleNamespace(family=SimpleNamespace(kind="causal", model_type="llama"))
    algorithm = Config().build(rollout=sampler(), num_prompts=1, mask_id=MASK, seed=0)
    with pytest.raises(ValueError, match=r"llama.*causal"):
        algorithm.modules(policy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shrink": 0}, "algorithm.shrink"),
        ({"mask_low": 0.9, "mask_high": 0.2}, "algorithm.mask_low"),
        ({"clip_low": 1.5}, "algorithm.clip_low"),
        ({"kl_weight": math.inf}, "algorithm.kl_weight"),
        ({"kl_weight": math.nan}, "algorithm.kl_weight"),
        ({"mini_batch": 5}, "multiple of"),
        ({"estimator": "coupled", "num_masks": 3}, "must be even"),
        ({"estimator": "random_masking", "shrink": 2}, "no steps to shrink"),
        ({"old_logprob": "rollout", "score_temperature": 0.7}, "temperature 1"),
        ({"value_pretraining": 2}, "needs a value model"),
        ({"schedule": ("iterations=0",)}, "positive integer"),
        ({"loss_agg": "median"}, "algorithm.loss_agg must be one of"),
        ({"drop_below": 0.9, "drop_above": 0.5}, "algorithm.drop_below"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)
    assert replace(Config(), group_size=2).group_size == 2
