"""Phases of TraceRL: larger blocks in training than in decoding, longer responses by and by."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_toys import build, context, rollout, sampled_groups, sampler, tiny

import dlm_fast
from dlm_fast.algorithms.schedule import Phase, Schedule
from dlm_fast.algorithms.trace_rows import NEVER, rows_of_blocks, traced
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility
from dlm_fast.rollout import sample

PUBLISHED = ("iterations=60,train_block_size=8", "iterations=40,block_size=8")


def test_the_published_schedule():
    schedule = Schedule(PUBLISHED, sampler())
    sizes = [
        (stage.rollout.block_size, stage.train_block_size)
        for stage in map(schedule.at, (0, 59, 60, 99, 1000))
    ]
    assert sizes == [(4, 8), (4, 8), (8, 8), (8, 8), (8, 8)]
    # as many steps per token as before: each block of 8 has twice those of a block of 4
    assert {schedule.at(i).rollout.steps for i in (0, 60)} == {6}
    assert Schedule((), sampler()).at(5).rollout == sampler()


def test_lengths_grow():
    schedule = Schedule(
        ("iterations=2,max_new_tokens=4", "iterations=2,max_new_tokens=8", "steps=12"), sampler()
    )
    stages = [schedule.at(i).rollout for i in (0, 1, 2, 3, 4)]
    assert [s.max_new_tokens for s in stages] == [4, 4, 8, 8, 12]
    assert [s.steps for s in stages] == [2, 2, 4, 4, 12]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("iterations=2", "train_block_size=6"), "multiple of the blocks that are decoded, 4"),
        (("block_size=8,train_block_size=4",), "multiple of the blocks that are decoded, 8"),
        (("train_block_size=8", "block_size=8"), "not the last phase"),
        (("rounds=3",), "'rounds=3'.*one of iterations, block_size"),
        (("iterations=2,iterations=3",), "each name once"),
        (("iterations",), "NAME=NUMBER"),
        (("iterations=-1",), "positive integer, got '-1'"),
        (("iterations=1e3",), "positive integer"),
        (("iterations=²",), "positive integer"),
        (("max_new_tokens=13",), "above rollout.max_new_tokens=12"),
        (("block_size=16",), "must not exceed rollout.max_new_tokens"),
        (("steps=1",), "rollout.steps=1 leaves some"),
    ],
)
def test_wrong_schedules(texts, words):
    with pytest.raises(ValueError, match=words):
        Schedule(texts, sampler())


def test_phases_from_text():
    assert Phase.parse(" iterations = 3 , steps=4") == Phase(iterations=3, steps=4)


def test_models_without_blocks_refuse_other_sizes():
    with pytest.raises(ValueError, match="sees the whole sequence"):
        build(tiny("full"), schedule=("train_block_size=8",)).modules(tiny("full"))
    algorithm = build(tiny("full"), schedule=("iterations=1,max_new_tokens=8", "steps=12"))
    algorithm.modules(tiny("full"))
    assert algorithm.sampling(0).sampler.max_new_tokens == 8
    with pytest.raises(ValueError, match=r"own blocks of 8; set rollout.block_size=8"):
        build(tiny("block", block_size=8)).modules(tiny("block", block_size=8))


def test_blocks_that_would_cut_decoded_ones():
    with pytest.raises(ValueError, match=r"blocks of 4 tokens, which blocks of 6 would cut"):
        traced(rollout([1, 2, 3], block_size=4), kind="block", eos_ids=[], block_size=6)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_enlarged_blocks_score_what_the_larger_block_would_show(data):
    """Every target against a forward of its own: earlier blocks of 8 clean, in its own block the
    tokens of earlier steps, the rest masks, those included that decoding never came to."""
    policy = ENLARGED
    prompt = data.draw(st.integers(1, 9))
    length = data.draw(st.integers(1, 12))
    edges = [(prompt + i) // 4 for i in range(length)]
    step, first = [], 0
    for block in sorted(set(edges)):
        count = edges.count(block)
        own = [first + data.draw(st.integers(1, 3)) for _ in range(count)]
        first = max(own)
        step += own
    trajectory = rollout(step, prompt=range(3, 3 + prompt), block_size=4)
    shrink = data.draw(st.integers(1, 3))
    response = traced(trajectory, kind="block", eos_ids=[], block_size=8, window=12)
    end = min(12, -(-(prompt + length) // 8) * 8 - prompt)
    assert response.ids.numel() == end and (response.step[0, length:] == NEVER).all()
    mask_id = policy.family.mask_id
    (rows,) = rows_of_blocks(
        [response], block_size=8, mask_id=mask_id, shrink=shrink, row_budget=1 << 20
    )
    with torch.no_grad():
        request = ScoreRequest(rows.rows, rows.targets)
        packed = policy(rows.input_ids, rows.visibility, score=request).logprob
        assert sorted(rows.token.tolist()) == list(range(length))
        for u, (token, value) in enumerate(
            zip(rows.token.tolist(), rows.step.tolist(), strict=True)
        ):
            block = (prompt + token) // 8
            ids = torch.cat([trajectory.prompt_ids, response.ids])[: 8 * (block + 1)].clone()
            merged = merged_steps(response.step[0].tolist(), prompt, block, shrink)
            for i, group in merged.items():
                if group >= value:
                    ids[prompt + i] = mask_id
            visibility = Visibility.block_causal([len(ids)], 8)
            alone = ScoreRequest(torch.tensor([prompt + token]).int(), rows.targets[u : u + 1])
            expected = policy(ids, visibility, score=alone).logprob
            assert torch.allclose(packed[u], expected[0], atol=1e-12)


def merged_steps(step, prompt, block, shrink):
    """token -> last step of its group of ``shrink`` neighbours, of the tokens of one block of 8."""
    inside = {i: s for i, s in enumerate(step) if (prompt + i) // 8 == block}
    distinct = sorted(set(inside.values()))
    last = [min(k // shrink * shrink + shrink, len(distinct)) - 1 for k in range(len(distinct))]
    return {i: distinct[last[distinct.index(s)]] for i, s in inside.items()}


ENLARGED = tiny("block")


def test_decoding_in_larger_blocks():
    """The second phase decodes, scores and evaluates in blocks of 8, and agrees with itself."""
    policy = tiny("block")
    algorithm = build(policy, schedule=("iterations=1,train_block_size=8", "block_size=8"))
    made, _ = context(algorithm, policy)
    assert algorithm.sampling(0).sampler.block_size == 4 and policy.family.block_size == 4
    algorithm.prepare(sampled_groups(policy), made)
    plan = algorithm.sampling(1)
    assert plan.sampler.block_size == 8 and policy.family.block_size == 8
    assert algorithm.decoding(1, sampler(temperature=0.5)) == sampler(temperature=0.5, block_size=8)
    made.iteration = 1
    groups = sampled_groups(policy, block_size=8)
    samples = algorithm.prepare(groups, made)
    for tokens in samples.policy[0]:
        _, metrics = algorithm.loss(tokens, policy)
        total, count = metrics["trace/mismatch"]
        assert total / count < 1e-6


def test_saved_models_have_the_new_blocks(tmp_path):
    policy = dlm_fast.load("tiny", kind="block", block_size=4)
    with pytest.raises(ValueError, match="positive integer"):
        policy.set_block_size(0)
    with pytest.raises(ValueError, match="has no blocks"):
        dlm_fast.load("tiny").set_block_size(8)
    policy.set_block_size(8)
    policy.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["block_size"] == 8
    again = dlm_fast.load(str(tmp_path))
    assert again.family == policy.family
    config = sampler(block_size=8)
    prompts = [torch.arange(3, 8)]
    before, after = (sample(p, prompts, config, seed=1)[0] for p in (policy, again))
    assert torch.equal(before.response_ids, after.response_ids)
