"""The order in which a model would reveal given text."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithm_toys import context_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_definitions import EVERY, Spelt, demonstration, make, tiny

import dlm_fast
from dlm_fast.algorithms.sft_states import demonstrated, one_block_at_a_time
from dlm_fast.algorithms.sft_trace import collect_traces
from dlm_fast.algorithms.trace_rows import NEVER, Traced
from dlm_fast.algorithms.trace_tokens import Layout
from dlm_fast.models.requests import StatsRequest
from dlm_fast.rollout import sample
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group

WINDOW = 14


def collected(policy, groups, block_size, per_step, budget=4000, num_pads=None):
    family = policy.family
    layout = Layout(
        kind=family.kind,
        block_size=block_size,
        mask_id=family.mask_id,
        shrink=7,  # is for training alone
        row_budget=budget,
    )

    def confidence(rows):
        request = StatsRequest(
            rows=policy.predicting_rows(rows.rows, rows.visibility), forbid_ids=(family.mask_id,)
        )
        return policy(rows.input_ids, rows.visibility, stats=request).confidence

    responses = [
        demonstrated(
            trajectory,
            kind=family.kind,
            eos_ids=family.eos_ids,
            block_size=block_size,
            window=WINDOW,
            num_pads=num_pads,
        )
        for group in groups
        for trajectory in group.trajectories
    ]
    with torch.no_grad():
        return collect_traces(
            responses, layout=layout, tokens_per_step=per_step, confidence=confidence
        )


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["full", "block"]),
    shift=st.sampled_from([0, 1]),
    block_size=st.integers(1, 6),
    per_step=st.integers(1, 3),
    prompts=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 11), min_size=3, max_size=3),
    pads=st.integers(0, 3),
    budget=st.sampled_from([1, 4000]),
)
def test_steps_are_those_of_one_forward_each(
    kind, shift, block_size, per_step, prompts, lengths, pads, budget
):
    """A step reveals the surest positions given the true tokens; every target has one."""
    own = kind == "block"
    policy = tiny(kind, block_size if own else 4, None if own else shift)
    pairs = enumerate(zip(prompts, lengths, strict=False))
    groups = [demonstration(p, r, i, pads) for i, (p, r) in pairs]
    found = collected(policy, groups, block_size, per_step, budget, num_pads=0)
    for response in found:
        length = response.trajectory.response_length - pads
        text = Spelt(policy, response.trajectory, block_size, WINDOW, length)
        step_n = response.step[0].tolist()
        steps = text.greedy_steps(per_step)
        assert step_n[:length] == [
            1 + next(i for i, step in enumerate(steps) if token in step) for token in range(length)
        ]
        assert all(step == NEVER for step in step_n[length:])


@pytest.mark.parametrize("kind", ["full", "block"])
def test_text_of_the_models_own_has_the_steps_of_its_decoding(kind):
    """Greedy decoding, two tokens a step: had the demonstration been decoded, this is its trace."""
    policy = tiny(kind)
    config = SamplerConfig(max_new_tokens=12, block_size=4, steps=6, early_stop=False)
    decoded = sample(policy, [torch.arange(3, 11), torch.arange(20, 24)], config)
    groups = [Group(task_id=0, prompt_ids=t.prompt_ids, trajectories=[t]) for t in decoded]
    for response, rollout in zip(collected(policy, groups, 4, 2), decoded, strict=True):
        assert response.step[0].tolist() == rollout.step_map.tolist()


def test_equally_sure_positions_go_from_the_left():
    groups = [demonstration(4, 8)]
    (response,) = collected(ALIKE, groups, 4, 2)
    assert response.step[0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def alike():
    """A model that says the same everywhere."""
    policy = copy.deepcopy(tiny("block"))
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    return policy


ALIKE = alike()


def test_recorded_steps_are_taken_as_they_are():
    """No forward is spent on a demonstration that comes with its steps."""
    policy = tiny("block")
    groups = [demonstration(4, 8), demonstration(6, 7, 1)]
    groups[0].trajectories[0].step_map = torch.tensor([2, 1, 1, 3, 4, 4, 5, 5], dtype=torch.int32)
    about, asked = context_of(policy), []
    score = about.score

    def counted(input_ids, visibility=None, **request):
        asked.append(input_ids)
        return score(input_ids, visibility, **request)

    about.score = counted
    made = make(policy, variant="trace")
    made.modules(policy)
    (micro,) = made.prepare(groups, about)
    rows = micro.rows
    own = rows.response == 0
    recorded = dict(zip(rows.token[own].tolist(), rows.step[own].tolist(), strict=True))
    assert [recorded[token] for token in range(8)] == [2, 1, 1, 3, 4, 4, 5, 5]
    first = groups[0].trajectories[0].prompt_ids.tolist()
    assert asked and all(ids[: len(first)].tolist() != first for ids in asked)


@pytest.mark.parametrize("kind", ["full", "block"])
def test_masks_are_no_guess(kind):
    """A model that would say "mask" everywhere is as sure as of what it would say next."""
    policy = copy.deepcopy(tiny(kind))
    mask = policy.family.mask_id
    with torch.no_grad():
        policy.lm_head.weight[mask] = (
            2 * policy.lm_head.weight.mean(0) + 3 * policy.lm_head.weight[5]
        )
    group = demonstration(4, 12)
    text = Spelt(policy, group.trajectories[0], 4, WINDOW, 12)
    made = make(policy, variant="trace")
    made.modules(policy)
    found: dict[int, set[int]] = {}
    for micro in made.prepare([group], context_of(policy)):
        for token, step in zip(micro.rows.token.tolist(), micro.rows.step.tolist(), strict=True):
            found.setdefault(step, set()).add(token)
    assert [found[step] for step in sorted(found)] == [set(s) for s in text.greedy_steps(2)]


def test_one_block_at_a_time():
    """Earlier blocks are known but for what was never visible; later ones are masked."""
    step = torch.tensor([[1, NEVER, 2, 1, 2]], dtype=torch.int32)
    response = Traced(
        trajectory=demonstration(3, 5).trajectories[0],
        ids=torch.arange(5),
        step=step,
        trainable=step == 2,
    )
    made = one_block_at_a_time(response, 2)
    assert made.step.tolist() == [
        [1, NEVER, NEVER, NEVER, NEVER],
        [0, NEVER, 2, 1, NEVER],
        [0, NEVER, 0, 0, 2],
    ]
    assert made.trainable.nonzero().tolist() == [[1, 2], [2, 4]]


def test_the_trace_is_that_of_the_present_weights():
    """Nothing is kept between iterations, so a resumed run needs nothing."""
    policy = copy.deepcopy(tiny("block"))
    groups = [demonstration(4, 16)]
    made = make(policy, variant="trace")
    before = run(made, policy, groups)[0]
    assert run(made, policy, groups)[0].loss == before.loss
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    after = collected(policy, groups, 4, 2)
    assert after[0].step.tolist() != collected(tiny("block"), groups, 4, 2)[0].step.tolist()


@pytest.mark.parametrize(("variant", "kind"), EVERY)
def test_training_on_one_demonstration_learns_it(variant, kind):
    policy = dlm_fast.load("tiny", kind=kind, width=32, layers=1, heads=2)
    number = {"num_samples": 4} if variant in ("random_masking", "semi_ar") else {}
    made = make(policy, variant=variant, **number)
    groups = [demonstration(3, 9)]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    losses = []
    for iteration in range(40):
        losses.append(run(made, policy, groups, context_of(policy, iteration=iteration))[0].loss)
        optimizer.step()
    assert sum(losses[-3:]) < 0.15 * sum(losses[:3])
