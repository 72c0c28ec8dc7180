"""The numbers that define TraceRL: slices, blocks, packed against one forward per state, returns.

Further oracles stand with the functions they are of: T1 to T5 in ops/test_trace_pack.py, T6 in
test_trace_returns.py, T7 to T9 in test_clipped_loss.py, T10 in test_tracerl.py, T11 in
rollout/test_rules.py, T12 in rollout/test_block_cache.py, T13 in ops/test_token_logprob.py, T14 in
test_tracerl_learns.py, T15 in test_trace_rows.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_toys import MASK, build, context, rollout, sampled_groups, tiny

import dlm_fast
from dlm_fast.algorithms.advantages import group_advantage
from dlm_fast.algorithms.trace_returns import step_returns
from dlm_fast.algorithms.trace_rows import rows_of_blocks, rows_of_slices, slice_index, traced
from dlm_fast.algorithms.trace_tokens import Layout, Record
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.models.value import ValueModel
from dlm_fast.ops import Visibility

ALL = 10**6
"""a budget of rows that one pack keeps"""
SIX = [6, 6, 6, 6]
TWELVE = [1, 1, 2, 5, *SIX, 7, 8, 9, 10]


def block_rows(step, *, prompt=(), block_size=4, shrink=1):
    """The one pack of one response, and the response."""
    options = {"kind": "block", "eos_ids": [], "block_size": block_size}
    response = traced(rollout(step, prompt=prompt), **options)
    (rows,) = packed([response], block_size, shrink)
    return rows, response


def packed(made, block_size, shrink=1, mask_id=MASK):
    options = {"block_size": block_size, "shrink": shrink, "mask_id": mask_id}
    return rows_of_blocks(made, **options, row_budget=ALL)


def by_token(rows, values):
    """Values in the order of the response's tokens."""
    return values[rows.token.argsort()].tolist()


# --- T1, T2: merged steps, slices, blocks


@pytest.mark.parametrize(
    ("step", "block_size", "shrink", "merged", "rounds"),
    [
        ([1, 3, 2, 4, 6, 5], 3, 2, [2, 3, 2, 5, 6, 5], [2, 2]),
        (TWELVE, 4, 1, TWELVE, [3, 1, 4]),
        (TWELVE, 4, 2, [2, 2, 2, 5, *SIX, 8, 8, 10, 10], [2, 1, 2]),
        (TWELVE, 4, 3, [5, 5, 5, 5, *SIX, 9, 9, 9, 10], [1, 1, 2]),
        (TWELVE, 4, 4, [5, 5, 5, 5, *SIX, 10, 10, 10, 10], [1, 1, 1]),
        (TWELVE, 4, 9, [5, 5, 5, 5, *SIX, 10, 10, 10, 10], [1, 1, 1]),
    ],
)
def test_rounds_of_each_block(step, block_size, shrink, merged, rounds):
    rows, response = block_rows(step, block_size=block_size, shrink=shrink)
    assert by_token(rows, rows.step) == merged
    block = rows.token // block_size
    assert [len(rows.step[block == b].unique()) for b in range(len(rounds))] == rounds
    # a trainer with one pass per slice scores round l of all blocks in pass l
    passes = slice_index(rows, [response], kind="block", block_size=block_size)
    assert int(passes.max()) + 1 == max(rounds)


def test_targets_of_the_first_and_second_round():
    rows, response = block_rows([1, 3, 2, 4, 6, 5], block_size=3, shrink=2)
    passes = slice_index(rows, [response], kind="block", block_size=3)
    assert sorted(rows.token[passes == 0].tolist()) == [0, 2, 3, 5]
    assert sorted(rows.token[passes == 1].tolist()) == [1, 4]


def test_blocks_lie_on_the_grid_from_position_zero():
    step = [1, 2, 3, 2, 3, 4, 5, 5]
    rows, _ = block_rows(step, prompt=(7, 7, 7))
    chunk = rows.visibility.intervals[rows.rows.long(), 0]
    position = rows.visibility.position_ids[rows.rows.long()]
    assert by_token(rows, position // 4 - 3 // 4) == [0, 1, 1, 1, 1, 2, 2, 2]
    assert chunk.unique().numel() == 5
    ids = [sorted(set(rows.step[position // 4 == b].tolist())) for b in range(3)]
    assert ids == [[1], [2, 3], [4, 5]]


# --- T4: packed equals one forward per state


@st.composite
def responses(draw):
    """A prompt, a block size, and a response whose blocks were decoded one after the other."""
    prompt, length = draw(st.integers(1, 8)), draw(st.integers(1, 13))
    block_size, shrink = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    step = torch.randint(1, block_size + 1, (length,), generator=generator)
    step += (prompt + torch.arange(length)) // block_size * block_size
    prompt_ids, ids = (torch.randint(0, 30, (n,), generator=generator) for n in (prompt, length))
    made = rollout(step.tolist(), prompt=prompt_ids.tolist(), ids=ids.tolist())
    return made, block_size, shrink, generator


def models(policy):
    """The policy and a value model with a head that is no longer zero."""
    value = ValueModel(policy)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        weight = torch.randn(value.lm_head.weight.shape, generator=generator)
        value.lm_head.weight.copy_(weight / len(weight) ** 0.5)
    return policy, value


TINY = {size: models(tiny("block", layers=3, block_size=size)) for size in range(1, 6)}


def score(policy, value, input_ids, visibility, rows, targets):
    """float64 log-probabilities and values of these rows."""
    output = policy(input_ids, visibility, score=ScoreRequest(rows, targets))
    return output.logprob.double(), value(input_ids, visibility, rows=rows).double()


def states(trajectory, block_size, shrink, mask_id):
    """(input ids, rows, token indices) of every block in every merged step, spelt out."""
    prompt, step = trajectory.prompt_length, trajectory.step_map.tolist()
    blocks = [(prompt + i) // block_size for i in range(len(step))]
    for block in sorted(set(blocks)):
        own = [i for i, b in enumerate(blocks) if b == block]
        distinct = sorted({step[i] for i in own})
        for first in range(0, len(distinct), shrink):
            group = distinct[first : first + shrink]
            ids = trajectory.input_ids[: prompt + own[-1] + 1].clone()
            for i in own:
                if step[i] >= group[0]:
                    ids[prompt + i] = mask_id
            token = [i for i in own if step[i] in group]
            yield ids, torch.tensor([prompt + i for i in token], dtype=torch.int32), token


def packed_and_separate(policy, value, made, block_size, shrink, weights):
    """Both ways: log-probabilities, values and gradients of their weighted sum."""
    weight_logprob, weight_value = weights
    parameters = [*policy.parameters(), *value.parameters()]
    mask_id = policy.family.mask_id

    def finished(logprob, values):
        total = (weight_logprob * logprob).sum() + (weight_value * values).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return logprob.detach(), values.detach(), gradients

    response = traced(made, kind="block", eos_ids=[], block_size=block_size)
    (rows,) = packed([response], block_size, shrink, mask_id)
    assert sorted(rows.token.tolist()) == list(range(made.response_length))  # each exactly once
    order = rows.token.argsort()
    found = score(policy, value, rows.input_ids, rows.visibility, rows.rows, rows.targets)
    together = finished(*(numbers[order] for numbers in found))
    tokens, parts = [], []
    for ids, row, token in states(made, block_size, shrink, mask_id):
        visibility = Visibility.block_causal([len(ids)], block_size)
        targets = made.response_ids[token]
        parts.append(score(policy, value, ids, visibility, row, targets))
        tokens += token
    order = torch.tensor(tokens).argsort()
    separate = finished(*(torch.cat(part)[order] for part in zip(*parts, strict=True)))
    return together, separate


def assert_within(together, separate, tolerance, with_gradients=True):
    for ours, truth in zip(together[:2], separate[:2], strict=True):
        assert float((ours - truth).abs().max()) < tolerance
    for ours, truth in zip(together[2], separate[2], strict=True) if with_gradients else ():
        assert (ours is None) == (truth is None)
        if ours is not None:
            scale = max(1.0, float(truth.abs().max()))
            assert float((ours - truth).abs().max()) / scale < tolerance


@settings(max_examples=40, deadline=None)
@given(responses())
def test_packed_equals_per_step_in_float64(case):
    made, block_size, shrink, generator = case
    weights = torch.randn(2, made.response_length, generator=generator, dtype=torch.float64)
    both = packed_and_separate(*TINY[block_size], made, block_size, shrink, weights)
    assert_within(*both, 1e-12)


@settings(max_examples=10, deadline=None)
@given(responses(), st.sampled_from([(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]))
def test_packed_equals_per_step_in_fewer_bits(case, precision):
    made, block_size, shrink, generator = case
    dtype, tolerance = precision
    policy, value = (copy.deepcopy(model).to(dtype) for model in TINY[block_size])
    weights = torch.randn(2, made.response_length, generator=generator, dtype=torch.float64)
    both = packed_and_separate(policy, value, made, block_size, shrink, weights)
    assert_within(*both, tolerance, with_gradients=dtype == torch.float32)


@pytest.mark.parametrize("shrink", [1, 2])
def test_packed_equals_per_step_for_a_checkpoint(shared_data, shrink):
    policy = dlm_fast.load(shared_data / "checkpoints" / "sdar_tiny", dtype="float64")
    policy, value = models(policy)
    size, mask_id = policy.family.block_size, policy.family.mask_id
    generator = torch.Generator().manual_seed(shrink)
    for prompt, length in ((5, 13), (8, 6), (3, 11)):
        step = torch.randint(1, size + 1, (length,), generator=generator)
        step += (prompt + torch.arange(length)) // size * size
        ids = torch.randint(0, mask_id, (prompt + length,), generator=generator).tolist()
        made = rollout(step.tolist(), prompt=ids[:prompt], ids=ids[prompt:])
        weights = torch.randn(2, length, generator=generator, dtype=torch.float64)
        assert_within(*packed_and_separate(policy, value, made, size, shrink, weights), 1e-12)


# --- T5: limits


def test_merging_all_steps_of_a_full_response_masks_it_all():
    response = traced(rollout([3, 1, 2, 5]), kind="full", eos_ids=[], block_size=4)
    for shrink in (4, 9):
        (rows,) = rows_of_slices([response], mask_id=MASK, shrink=shrink, row_budget=ALL)
        assert rows.input_ids.tolist() == [5, 6, 7, *[MASK] * 4]
        assert rows.rows.tolist() == [3, 4, 5, 6] and rows.targets.tolist() == [10, 11, 12, 13]


def test_blocks_of_one_token_are_scored_from_left_to_right():
    policy, value = TINY[1]
    made = rollout([1, 2, 3, 4, 5], ids=[9, 4, 4, 8, 2])
    mask_id = policy.family.mask_id
    (rows,) = packed([traced(made, kind="block", eos_ids=[], block_size=1)], 1, mask_id=mask_id)
    logprob, _ = score(policy, value, rows.input_ids, rows.visibility, rows.rows, rows.targets)
    for j in range(5):
        ids = torch.cat([made.input_ids[: 3 + j], torch.tensor([mask_id])])
        with torch.no_grad():
            logits = policy.logits(ids, Visibility.causal([len(ids)]))
        expected = logits[-1].log_softmax(-1)[made.response_ids[j]]
        assert float(logprob[rows.token == j].detach()) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("shrink", [1, 2, 3, 7])
def test_slices_of_full_responses(shrink):
    steps = [[1, 2, 3, 4, 5], [2, 2, 1], [1] * 6, [7, 3, 5, 1]]
    made = [traced(rollout(s), kind="full", eos_ids=[], block_size=4) for s in steps]
    (rows,) = rows_of_slices(made, mask_id=MASK, shrink=shrink, row_budget=ALL)
    assert len(rows.visibility.lengths) == sum(-(-len(set(s)) // shrink) for s in steps)


@pytest.mark.parametrize("kind", ["full", "block"])
def test_neither_company_nor_packing_changes_a_score(kind):
    """Prompts of different lengths, nothing padded: alone, in any order, in packs of any size."""
    policy = tiny(kind)
    sampled = [t for g in sampled_groups(policy, prompts=3, size=2) for t in g.trajectories]
    made = [traced(t, kind=kind, eos_ids=[], block_size=4) for t in sampled]

    def scores(order, row_budget):
        layout = Layout(kind=kind, block_size=4, mask_id=MASK, shrink=1, row_budget=row_budget)
        found = {}
        for rows in layout.rows([made[i] for i in order]):
            request = ScoreRequest(policy.predicting_rows(rows.rows, rows.visibility), rows.targets)
            with torch.no_grad():
                logprob = policy(rows.input_ids, rows.visibility, score=request).logprob
            for response, token, one in zip(rows.response, rows.token, logprob, strict=True):
                found[order[int(response)], int(token)] = float(one)
        return found

    alone = {}
    for i in range(len(made)):
        alone |= scores([i], ALL)
    assert len(alone) == sum(t.response_length for t in sampled)
    for order, budget in (([4, 0, 5, 2, 1, 3], ALL), ([0, 1, 2, 3, 4, 5], 50), ([5, 3, 1], 1)):
        for key, logprob in scores(order, budget).items():
            assert logprob == pytest.approx(alone[key], abs=1e-12)


# --- T6, T7, T9, T10, T14


@pytest.mark.parametrize(
    ("gamma", "lam", "reward", "returns", "advantages"),
    [
        (1, 1, [0, 0, 0, 1, 1], [1, 1, 1], [0.7, 0.5, 0.3]),
        (1, 0, [0, 0, 0, 1, 1], [1, 1, 1], [0.2, 0.2, 0.3]),
        (0.9, 0.5, [0, 0, 0, 1, 1], [0.81, 0.9, 1], [0.26925, 0.265, 0.3]),
        (0.9, 0.5, [0, -1, 0, 1, 0.5], [-0.2925, -0.325, 0.75], [-0.231375, -0.8475, 0.05]),
    ],
)
def test_returns_and_advantages_of_steps(gamma, lam, reward, returns, advantages):
    step = torch.tensor([1, 2, 1, 3, 3])
    value = torch.tensor([0.2, 0.5, 0.4, 0.6, 0.8])
    found = step_returns(torch.zeros(5).int(), step, torch.tensor(reward), value, gamma, lam)
    for tokens, steps in ((found.returns, returns), (found.advantages, advantages)):
        means = [float(tokens[step == t].mean()) for t in (1, 2, 3)]
        assert means == pytest.approx(steps, abs=1e-7)
    one_step = step_returns(
        torch.zeros(5).int(), torch.ones(5).int(), torch.tensor(reward), value, gamma, lam
    )
    assert torch.allclose(one_step.advantages, torch.tensor(reward) - value.double())


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_the_divergence_has_no_slope_at_the_first_update(kl):
    policy = tiny("block")
    gradients = []
    for kl_weight in (0.0, 0.7):
        algorithm = build(policy, kl=kl, kl_weight=kl_weight, epochs=2)
        made, _ = context(algorithm, policy)
        (step,) = algorithm.prepare(sampled_groups(policy), made).policy
        assert step[0].old is not None  # the general path, at ratio 1
        loss, metrics = algorithm.loss(step[0], policy)
        assert abs(metrics["policy/kl"][0]) < 1e-12
        gradients.append(torch.autograd.grad(loss, policy.lm_head.weight)[0])
    assert torch.allclose(*gradients, atol=1e-13) and bool(gradients[0].any())


@pytest.mark.parametrize(
    ("agg", "objective"),
    [("step_mean", 4), ("slice_mean", 2), ("slice_len", 0.6), ("token_mean", 2)],
)
def test_averages_of_one_response(agg, objective):
    """Three tokens in one block of four, revealed in steps 1, 1, 2; A = 2, padded to five."""
    response = traced(rollout([1, 1, 2], prompt=(5,) * 4), kind="block", eos_ids=[], block_size=4)
    layout = Layout(kind="block", block_size=4, mask_id=MASK, shrink=1, row_budget=100)
    record = Record(traced=response, advantage=2.0, update=0)
    (tokens,), divisor = layout.tokens([record], agg, 5)
    found = float((tokens.share * tokens.advantage).sum()) / divisor
    assert found == pytest.approx(objective)


def test_moments_of_a_group():
    rewards = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0], dtype=torch.float64)
    assert float(rewards.mean()) == 0.375
    assert float(rewards.std(correction=0)) == pytest.approx(0.484123, abs=1e-6)
    expected = (rewards - 0.375) / 0.484123
    found = torch.as_tensor(group_advantage(rewards, "zscore")).double()
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_fresh_value_model_leaves_the_gradient_alone():
    policy = tiny("block")
    groups, gradients = sampled_groups(policy), []
    for value in ("own", "shared", "none"):
        algorithm = build(policy, value=value, gamma=1.0, lam=1.0)
        made, _ = context(algorithm, policy)
        (step,) = algorithm.prepare(groups, made).policy
        loss = sum(algorithm.loss(tokens, policy)[0] for tokens in step)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(loss, parameters))
    for own, shared, without in zip(*gradients, strict=True):
        assert torch.allclose(own, without, atol=1e-13)
        assert torch.allclose(shared, without, atol=1e-13)
