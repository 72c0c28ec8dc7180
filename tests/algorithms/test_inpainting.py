"""Which groups are decoded again, around which hints, and what is replaced."""

from __future__ import annotations

import pytest
import torch
from igpo_toys import EOS, MASK, build, rollouts, sampler, tiny

from dlm_fast.rollout import sample
from dlm_fast.rollout.trajectory import Trajectory


def failed(policy, prompts=1, size=8, **fields):
    groups = rollouts(policy, prompts, size, hints=False)
    for group in groups:
        group.trace = "abcdefghijklmnopqrstuvwx"
        for t in group.trajectories:
            t.reward, t.correct = 0.1 * t.member, False
            for name, value in fields.items():
                setattr(t, name, value)
    return groups


def answering(right, asked):
    """A resample that gives so many right rollouts, first of all, per request."""

    def resample(requests):
        asked.extend(requests)
        made = []
        for request in requests:
            members = []
            for i in range(request.count):
                ids = torch.full((12,), 20 + i)
                given_ids = request.fixed_ids[i] if request.fixed_ids is not None else None
                hint = None if given_ids is None else given_ids != MASK
                members.append(
                    Trajectory(
                        prompt_ids=request.group.prompt_ids,
                        response_ids=ids,
                        hint_mask=hint,
                        reward=float(i < right),
                        correct=i < right,
                        group_id=request.group.trajectories[0].group_id,
                        member=100 + i,
                    )
                )
            made.append(members)
        return made

    return resample


@pytest.mark.parametrize(("right", "replaced"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (6, 4)])
def test_replacement_and_advantages(right, replaced):
    policy = tiny()
    algorithm = build(policy, num_prompts=1, group_size=8)
    algorithm.modules(policy)
    groups = failed(policy)
    before = list(groups[0].trajectories)
    for t in before:
        t.reward = 0.0
    asked = []
    (group,) = algorithm.refine(groups, answering(right, asked))
    assert len(asked) == 1 and asked[0].count == 8 and len(asked[0].fixed_ids) == 8
    members = [t.member for t in group.trajectories]
    assert all(m >= 100 for m in members[:replaced])
    assert group.trajectories[replaced:] == before[replaced:]
    assert sorted(members[:replaced]) == members[:replaced]
    share = replaced / 8
    advantages = (group.rewards - group.rewards.mean()).tolist()
    assert advantages == pytest.approx([1 - share] * replaced + [-share] * (8 - replaced))
    found = algorithm._refined
    assert found["igpo/rescued"] == (float(replaced > 0), 1.0)
    assert found["igpo/replaced"] == (float(replaced), 8.0)
    assert found["igpo/right_again"] == (float(right), 8.0)
    assert found["groups/all_wrong_before"] == (1.0, 1.0)
    assert found["groups/all_wrong_after"] == (float(replaced == 0), 1.0)


def test_the_lowest_rewards_give_way():
    policy = tiny()
    algorithm = build(policy, num_prompts=1, group_size=8, replace="lowest", max_replaced=0.25)
    algorithm.modules(policy)
    groups = failed(policy)
    groups[0].trajectories.reverse()  # rewards fall
    (group,) = algorithm.refine(groups, answering(3, []))
    assert [t.member >= 100 for t in group.trajectories] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("guidance", ["inpaint", "resample", "none"])
def test_groups_with_a_right_member_stay(guidance):
    policy = tiny()
    algorithm = build(policy, guidance=guidance)
    algorithm.modules(policy)
    groups = failed(policy, prompts=2, size=4)
    groups[0].trajectories[2].correct = True
    before = [list(g.trajectories) for g in groups]
    asked = []
    after = algorithm.refine(groups, answering(4, asked))
    assert after[0].trajectories == before[0]
    assert [r.group for r in asked] == ([] if guidance == "none" else [groups[1]])
    if guidance == "resample":
        assert asked[0].fixed_ids is None
    if guidance == "none":
        assert after[1].trajectories == before[1]


def test_hints_are_those_of_the_group_and_its_members():
    policy = tiny()
    asked = []
    for order in ((0, 1), (1, 0)):
        algorithm = build(policy)
        algorithm.modules(policy)
        groups = failed(policy, prompts=2, size=4)
        algorithm.refine([groups[i] for i in order], answering(0, asked))
    first, second, third, fourth = asked
    for one, two in ((first, fourth), (second, third)):
        assert all(torch.equal(a, b) for a, b in zip(one.fixed_ids, two.fixed_ids, strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(first.fixed_ids, second.fixed_ids, strict=True)
    )
    trace = policy.encode("abcdefghijklmnopqrstuvwx", chat=False)
    for fixed in first.fixed_ids:
        given_ids = fixed[fixed != MASK]
        assert torch.isin(given_ids, trace).all() and (fixed[10:] == MASK).all()
        assert given_ids.numel() <= 0.6 * 10


@pytest.mark.parametrize("trace", ["", "   ", "The answer is 4", "a"])
def test_groups_without_a_usable_trace(trace):
    policy = tiny()
    algorithm = build(policy, num_prompts=1)
    algorithm.modules(policy)
    groups = failed(policy, size=4)
    groups[0].trace = trace
    before, asked = list(groups[0].trajectories), []
    (group,) = algorithm.refine(groups, answering(4, asked))
    assert group.trajectories == before and not asked
    assert algorithm._refined["igpo/no_trace"] == (1.0, 1.0)


def test_special_tokens_of_a_trace_are_dropped(monkeypatch):
    policy = tiny()
    algorithm = build(policy, num_prompts=1, eta_low=1.0, eta_high=1.0, placement="inplace")
    algorithm.modules(policy)
    groups = failed(policy, size=4)
    ids = torch.tensor([MASK, 5, 6, EOS, 7, 8, 9])
    monkeypatch.setattr(type(policy), "encode", lambda *_, **__: ids)
    asked = []
    algorithm.refine(groups, answering(0, asked))
    assert asked[0].fixed_ids[0][:4].tolist() == [5, 6, 7, 8]
    assert algorithm._refined["igpo/special_tokens_dropped"] == (2.0, 1.0)


def test_inpainted_rollouts_take_no_forward_that_reveals_nothing():
    """A row needs min(its masks in the block, steps of a block) forwards for each block; rows go
    through their blocks on their own, so a batch needs those of its slowest row."""
    policy = tiny()
    generator = torch.Generator().manual_seed(3)
    config = sampler(temperature=1.0, early_stop=False, steps=9)
    fixed = []
    for row in range(6):
        ids = torch.full((12,), MASK)
        given_tokens = torch.rand(12, generator=generator) < row / 6
        ids[given_tokens] = 40
        fixed.append(ids)
    calls = []
    hook = policy.register_forward_hook(lambda *_: calls.append(1))
    prompts = [torch.arange(3, 8)] * 6
    made = sample(policy, prompts, config, seed=1, fixed_ids=fixed)
    hook.remove()
    masks = torch.stack(fixed).view(6, 3, 4).eq(MASK).sum(2)
    needed = masks.clamp(max=3).sum(1)
    assert [t.num_forwards for t in made] == needed.tolist()
    assert len(calls) == int(needed.max()) <= int(masks.clamp(max=3).max(0).values.sum())
    for t, ids in zip(made, fixed, strict=True):
        assert torch.equal(t.response_ids[ids != MASK], ids[ids != MASK])
        assert not (t.response_ids == MASK).any()
        assert torch.equal(t.hint_mask, ids != MASK)
