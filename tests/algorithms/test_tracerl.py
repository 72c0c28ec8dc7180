"""TraceRL on tiny models: rows against separate forwards, losses, updates, options."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlm_fast
from dlm_fast.algorithms.advantages import group_advantage
from dlm_fast.algorithms.contract import Context
from dlm_fast.algorithms.trace_rows import NEVER, randomly_masked, rows_of_slices, traced
from dlm_fast.algorithms.tracerl import Config
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility
from dlm_fast.rollout import sample
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

EOS, MASK = 1, 31


def rollout(step, *, prompt=(5, 6, 7), ids=None, **fields):
    """A recorded response; ids are no special tokens."""
    ids = list(range(10, 10 + len(step))) if ids is None else ids
    return Trajectory(
        prompt_ids=torch.tensor(prompt),
        response_ids=torch.tensor(ids),
        step_map=torch.tensor(step, dtype=torch.int32),
        logp_rollout=torch.full((len(step),), -1.0),
        **fields,
    )


def tiny(kind, **options):
    sizes = {"width": 16, "heads": 2, "layers": 2, "block_size": 4, "seed": 2}
    return dlm_fast.load("tiny", kind=kind, **(sizes | options)).double()


def sampler(**options):
    return SamplerConfig(**({"max_new_tokens": 12, "block_size": 4, "steps": 6} | options))


def sampled_groups(policy, prompts=2, size=4, **options):
    config = sampler(temperature=1.0, **options)
    ids = [torch.arange(3, 8 + p) for p in range(prompts) for _ in range(size)]
    made = sample(policy, ids, config, seed=3)
    groups = []
    for p in range(prompts):
        members = made[p * size : (p + 1) * size]
        for member, trajectory in enumerate(members):
            trajectory.group_id, trajectory.member = p, member
            trajectory.sequence_id = 10 * p + member
            trajectory.reward = float((trajectory.response_ids % 3 == 0).double().mean())
            trajectory.correct = trajectory.reward > 0.3
        groups.append(Group(task_id=p, prompt_ids=ids[p * size], trajectories=members))
    return groups


def context(algorithm, policy, iteration=0):
    modules = {name: spec.module for name, spec in algorithm.modules(policy).items()}

    def score(*inputs, module="policy", **requests):
        with torch.no_grad():
            return modules[module](*inputs, **requests)

    made = Context(score=score, global_sum=lambda x: x, iteration=iteration, seed=0, micro_batch=4)
    return made, modules


def build(policy, rollout_config=None, num_prompts=2, **options):
    config = Config(**({"group_size": 4} | options))
    return config.build(
        rollout=rollout_config or sampler(),
        num_prompts=num_prompts,
        mask_id=policy.family.mask_id,
        seed=5,
    )


# --- rows


def test_what_counts_of_a_rollout():
    """Filled tokens were masks; nothing behind the first end of text is a target."""
    trajectory = rollout([1, 2, 3, 4, 0, 0], ids=[10, EOS, 12, 13, EOS, EOS])
    full = traced(trajectory, kind="full", eos_ids=[EOS], block_size=4)
    assert full.step.tolist() == [[1, 2, 3, 4, NEVER, NEVER]]
    assert full.trainable.tolist() == [[True, True, False, False, False, False]]
    padded = traced(trajectory, kind="full", eos_ids=[EOS], block_size=4, num_pads=1)
    assert padded.trainable.sum() == 3
    # a block model never came to the second block after the prompt of three
    block = traced(trajectory, kind="block", eos_ids=[EOS], block_size=4)
    assert block.ids.tolist() == [10, EOS, 12, 13, EOS]
    hinted = rollout([0, 1], hint_mask=torch.tensor([True, False]))
    assert traced(hinted, kind="full", eos_ids=[], block_size=4).step.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="no step_map"):
        traced(replace_step(trajectory), kind="full", eos_ids=[], block_size=4)


def replace_step(trajectory):
    return Trajectory(prompt_ids=trajectory.prompt_ids, response_ids=trajectory.response_ids)


def test_slices():
    """Oracle T1 for full attention: the states and targets of merged steps."""
    response = traced(rollout([1, 3, 2, 4, 6, 5]), kind="full", eos_ids=[], block_size=4)
    (rows,) = rows_of_slices([response], mask_id=MASK, shrink=2, row_budget=1000)
    assert rows.step.tolist() == [2, 2, 4, 4, 6, 6] and rows.token.tolist() == [0, 2, 1, 3, 4, 5]
    states = rows.input_ids.view(3, -1)[:, 3:].tolist()
    assert states == [
        [MASK] * 6,
        [10, MASK, 12, MASK, MASK, MASK],
        [10, 11, 12, 13, MASK, MASK],
    ]
    one = list(rows_of_slices([response], mask_id=MASK, shrink=1, row_budget=9))
    assert len(one) == 6 and all(r.visibility.lengths == (9,) for r in one)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["full", "block"]),
    estimator=st.sampled_from(["trace", "random_masking", "coupled"]),
    shrink=st.integers(1, 3),
    budget=st.sampled_from([1, 40, 4000]),
    seed=st.integers(0, 1000),
)
def test_every_token_is_scored_in_its_state(kind, estimator, shrink, budget, seed):
    """The packs of any budget against one forward per state, spelt out."""
    policy = MODELS[kind]
    generator = torch.Generator().manual_seed(seed)
    responses = []
    for member in range(3):
        count = int(torch.randint(1, 9, (), generator=generator))
        step = torch.randint(1, 5, (count,), generator=generator).tolist()
        prompt = [3, 4, 5, 6, 7][: 2 + member % 2]
        trajectory = rollout(step, prompt=prompt, group_id=member % 2, sequence_id=member)
        response = traced(trajectory, kind=kind, eos_ids=[], block_size=4)
        if estimator != "trace":
            options = {"num_masks": 2, "low": 0.2, "high": 0.9, "seed": seed}
            block = 4 if kind == "block" else None
            response = randomly_masked(response, estimator=estimator, block_size=block, **options)
        responses.append(response)
    shrink = shrink if estimator == "trace" else 1
    algorithm = build(policy, shrink=shrink, rows_per_forward=budget, estimator="trace")
    algorithm.modules(policy)
    layout_rows = layout(policy, shrink, budget).rows(responses)
    found = {}
    for rows in layout_rows:
        request = ScoreRequest(policy.predicting_rows(rows.rows, rows.visibility), rows.targets)
        with torch.no_grad():
            logprob = policy(rows.input_ids, rows.visibility, score=request).logprob
        for u, value in enumerate(logprob.tolist()):
            key = (int(rows.response[u]), int(rows.copy[u]), int(rows.token[u]))
            assert key not in found
            found[key] = value
    expected = {
        (r, c, i)
        for r, response in enumerate(responses)
        for c, i in response.trainable.nonzero().tolist()
    }
    assert set(found) == expected
    for r, c, i in sorted(expected)[:: max(1, len(expected) // 6)]:
        assert found[r, c, i] == pytest.approx(alone(policy, responses[r], c, i, shrink), abs=1e-11)


def layout(policy, shrink, budget):
    from dlm_fast.algorithms.trace_tokens import Layout

    mask_id, kind = policy.family.mask_id, policy.family.kind
    return Layout(kind=kind, block_size=4, mask_id=mask_id, shrink=shrink, row_budget=budget)


def alone(policy, response, copy, token, shrink):
    """Log-probability of one token from a sequence of its own."""
    step, prompt = response.step[copy].tolist(), response.trajectory.prompt_length
    blocks = [0] * len(step)
    if policy.family.kind == "block":
        blocks = [(prompt + i) // 4 for i in range(len(step))]
    own = [i for i, b in enumerate(blocks) if b == blocks[token]]
    distinct = sorted({step[i] for i in own} - {0, NEVER})
    group = distinct[distinct.index(step[token]) // shrink * shrink :][:shrink]
    ids = response.ids.clone()
    for i in own:
        if step[i] >= group[0]:
            ids[i] = policy.family.mask_id
    ids = torch.cat([response.trajectory.prompt_ids, ids[: own[-1] + 1]])
    if policy.family.kind == "full":
        visibility = Visibility.full([len(ids)])
    else:
        visibility = Visibility.block_causal([len(ids)], 4)
    row = torch.tensor([prompt + token], dtype=torch.int32)
    request = ScoreRequest(policy.predicting_rows(row, visibility), response.ids[token, None])
    with torch.no_grad():
        return float(policy(ids, visibility, score=request).logprob)


MODELS = {kind: tiny(kind) for kind in ("full", "block")}


def test_drawn_masks():
    """Oracle T15; one rate per block gives the published law of mask counts."""
    response = traced(rollout([1] * 4000, prompt=()), kind="block", eos_ids=[], block_size=4)
    options = {"num_masks": 2, "low": 0.1, "high": 0.9, "block_size": 4, "seed": 1}
    pair = randomly_masked(response, estimator="coupled", **options)
    assert bool((pair.trainable[0] ^ pair.trainable[1]).all())
    counts = pair.trainable[0].view(-1, 4).sum(1).bincount(minlength=5) / 1000
    expected = torch.tensor([0.1476, 0.2295, 0.2457, 0.2295, 0.1476])
    assert bool(((counts - expected).abs() < 0.05).all())
    ended = rollout([1, 1, 1, 1], ids=[10, EOS, 12, 13])
    masked = randomly_masked(
        traced(ended, kind="full", eos_ids=[EOS], block_size=4),
        estimator="random_masking", num_masks=50, low=0.5, high=0.5, block_size=None, seed=0,
    )  # fmt: skip
    assert not masked.trainable[:, 2:].any() and (masked.step[:, 2:] == NEVER).all()
    assert 0.3 < masked.trainable[:, :2].double().mean() < 0.7


# --- losses


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
        assert float(algorithm.loss(tokens, policy)[0]) == pytest.approx(float(bare) / 1.5 * 2)


def test_rollout_log_probabilities_as_the_old_ones():
    policy = tiny("block")
    algorithm = build(policy, old_logprob="rollout")
    made, _ = context(algorithm, policy)
    (step,) = algorithm.prepare(sampled_groups(policy), made).policy
    assert all(tokens.old is tokens.rollout for tokens in step)


# --- value model


def test_a_fresh_value_model_changes_nothing():
    """T14: a zero head with gamma = lambda = 1 gives every token the response's advantage."""
    policy = tiny("block")
    groups = sampled_groups(policy)
    with_value, without = build(policy, value="own"), build(policy)
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
        ({"loss_agg": "median"}, "algorithm.loss_agg must be one of"),
        ({"drop_below": 0.9, "drop_above": 0.5}, "algorithm.drop_below"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)
    assert replace(Config(), group_size=2).group_size == 2
