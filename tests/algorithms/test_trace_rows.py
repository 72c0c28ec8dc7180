"""The rows that score recorded rollouts: against one forward per state, spelt out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_toys import EOS, MASK, rollout, tiny

from dlm_fast.algorithms.trace_rows import NEVER, randomly_masked, rows_of_slices, traced
from dlm_fast.algorithms.trace_tokens import Layout
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility
from dlm_fast.rollout.trajectory import Trajectory


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
        step = torch.randint(1, 5, (count,), generator=generator)
        prompt = [3, 4, 5, 6, 7][: 2 + member % 2]
        if kind == "block":  # decoded one after the other
            step += (len(prompt) + torch.arange(count)) // 4 * 4
        step = step.tolist()
        trajectory = rollout(step, prompt=prompt, group_id=member % 2, sequence_id=member)
        response = traced(trajectory, kind=kind, eos_ids=[], block_size=4)
        if estimator != "trace":
            options = {"num_masks": 2, "low": 0.2, "high": 0.9, "seed": seed}
            block = 4 if kind == "block" else None
            response = randomly_masked(response, estimator=estimator, block_size=block, **options)
        responses.append(response)
    shrink = shrink if estimator == "trace" else 1
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
    steps = [1 + i // 4 for i in range(4000)]
    response = traced(rollout(steps, prompt=()), kind="block", eos_ids=[], block_size=4)
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
