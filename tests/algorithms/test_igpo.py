"""IGPO on tiny models: shared forwards, replacement, filter and loss; learning from hints."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from trace_toys import context

import dlm_fast
from dlm_fast.algorithms.group_ratio import agg_divisor, averaged, divergence, objective
from dlm_fast.algorithms.igpo import Config
from dlm_fast.algorithms.igpo_options import IGPO_RELEASE
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility
from dlm_fast.rollout import sample
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

SMALL = {"group_size": 4, "tail": 2, "chunk_min": 2, "chunk_max": 4}


def tiny(**options):
    return dlm_fast.load("tiny", **({"width": 16, "layers": 2, "heads": 2, "seed": 2} | options))


EOS = tiny().family.eos_ids[0]
MASK = tiny().family.mask_id


def sampler(**options):
    return SamplerConfig(**({"max_new_tokens": 12, "block_size": 4, "steps": 6} | options))


def build(policy, num_prompts=2, rollout=None, **options):
    return Config(**(SMALL | options)).build(
        rollout=rollout or sampler(temperature=1.0),
        num_prompts=num_prompts,
        mask_id=policy.family.mask_id,
        seed=5,
    )


def rollouts(policy, prompts=2, size=4, hints=True):
    """Groups of different prompt lengths; the first two members of the first were given tokens."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for p in range(prompts):
        members = []
        for g in range(size):
            ids = torch.randint(3, 60, (12,), generator=generator)
            ids[8 + g :] = EOS
            hint = torch.zeros(12).bool()
            if hints and p == 0 and g < 2:
                hint[2:9] = True
            members.append(
                Trajectory(
                    prompt_ids=torch.arange(3, 8 + p),
                    response_ids=ids,
                    hint_mask=hint,
                    group_id=p,
                    member=g,
                    reward=float(g % 2),
                    correct=g % 2 == 1,
                )
            )
        groups.append(Group(task_id=p, prompt_ids=members[0].prompt_ids, trajectories=members))
    return groups


def one_forward_each(policy, start, algorithm, groups, keep, old):
    """The loss with a forward of its own for every rollout."""
    config, family = algorithm.config, policy.family
    never = algorithm.rollout.never_drawn(family)

    def logprobs(model, t):
        ids = torch.cat([t.prompt_ids, torch.full((12,), family.mask_id)])
        visibility = Visibility.full([len(ids)])
        rows = torch.arange(len(t.prompt_ids), len(ids), dtype=torch.int32)
        rows = policy.predicting_rows(rows, visibility)
        request = ScoreRequest(rows, t.response_ids, forbid_ids=never)
        return model(ids, visibility, score=request).logprob

    members = [t for group in groups for t in group.trajectories]
    new = torch.stack([logprobs(policy, t) for t in members])
    with torch.no_grad():
        reference = torch.stack([logprobs(start, t) for t in members])
    advantage = torch.cat([g.rewards - g.rewards.mean() for g in groups]).to(new.dtype)
    terms = objective(
        new - old,
        advantage,
        keep,
        level=config.ratio_level,
        mask=config.ratio_mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    kl = divergence(new, reference, keep)
    total = averaged(config.kl_weight * kl - terms.gain, keep, config.loss_agg)
    return total / agg_divisor(keep, config.loss_agg)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("options", [{}, {"ratio_level": "token"}, IGPO_RELEASE], ids=str)
def test_the_shared_forward_equals_one_for_each_rollout(shift, options):
    """Values and gradients, after the policy has moved from the old and the first weights."""
    policy = tiny(logit_shift=shift).double()
    algorithm = build(policy, kl_weight=0.3, prompts_per_forward=2, **options)
    made, _ = context(algorithm, policy)
    start = copy.deepcopy(policy)
    groups = rollouts(policy)
    ((windows,),) = algorithm.prepare(groups, made)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape).double())
    (one,) = windows
    parameters = list(policy.parameters())
    loss, metrics = algorithm.loss(one, policy)
    expected = one_forward_each(policy, start, algorithm, groups, one.keep, one.old)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    truth = torch.autograd.grad(expected, parameters, allow_unused=True)
    for a, b in zip(found, truth, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    kept = one.keep.sum().item()
    assert metrics["policy/logprob"][1] == kept
    hint = metrics["policy/ratio_mean_hint"][1] + metrics["policy/ratio_mean_generated"][1]
    assert hint == kept
    # prompts by themselves add up to the same loss
    apart = build(policy, kl_weight=0.3, prompts_per_forward=1, **options)
    again, _ = context(apart, start)
    ((two,),) = apart.prepare(groups, again)
    assert len(two) == 2
    apart._policy = policy
    both = sum(apart.loss(micro, policy)[0] for micro in two)
    assert both.item() == pytest.approx(loss.item(), abs=1e-10)


def test_what_enters_the_loss():
    policy = tiny()
    algorithm = build(policy)
    made, _ = context(algorithm, policy)
    (((one,),),) = algorithm.prepare(rollouts(policy), made)
    # up to the first end of text; of seven hint tokens one, of the largest entropy
    assert one.keep.sum(1).tolist() == [9 - 7 + 1, 10 - 7 + 1, 11, 12, 9, 10, 11, 12]
    row = policy.predicting_rows(one.masked.rows, one.masked.visibility)
    assert made.metrics["policy/hint_tokens"] == (2.0, 2.0)
    entropy = one.masked.score(policy).entropy.view(2, 12)[0, 2:9]
    kept = (one.keep & one.hint)[0, 2:9].nonzero()[0, 0].item()
    assert kept == entropy.argmax().item() and row.numel() == 24
    algorithm = build(policy, scored_tokens="all", hint_keep=1.0)
    made, _ = context(algorithm, policy)
    (((everything,),),) = algorithm.prepare(rollouts(policy), made)
    assert everything.keep.all()


def test_rows_that_are_not_finite_leave_the_loss():
    policy = tiny()
    algorithm = build(policy, kl_weight=0.0)
    made, _ = context(algorithm, policy)
    score = made.score

    def broken(*inputs, **requests):
        output = score(*inputs, **requests)
        output.logprob[3, 1] = float("nan")
        return output

    made.score = broken
    (((one,),),) = algorithm.prepare(rollouts(policy), made)
    assert made.metrics["policy/not_finite"] == (1.0, 8.0) and not one.keep[1].any()
    loss, _ = algorithm.loss(one, policy)
    assert loss.isfinite()


# --- refine


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


# --- learning


TARGET = list(range(10, 16))
GROUP = 8


def right(ids):
    """Three tokens in a row of the target, at their places: out of reach of a guess."""
    hits = ids[: len(TARGET)] == torch.tensor(TARGET)
    return bool((hits[:-2] & hits[1:-1] & hits[2:]).any())


def all_wrong(guidance, seed, iterations=16):
    """Share of iterations in which no plain rollout was right, and how far the policy moved."""
    policy = dlm_fast.load(
        "tiny", width=32, layers=1, heads=2, seed=seed, learned_positions=True, max_length=32
    )
    policy.encode = lambda text, chat=False: torch.tensor(TARGET)
    before = copy.deepcopy(policy.state_dict())
    config = sampler(max_new_tokens=16, block_size=16, steps=8, temperature=1.0, early_stop=False)
    algorithm = build(
        policy, 1, config, group_size=GROUP, guidance=guidance, kl_weight=0.0, eta_high=1.0,
        eta_low=0.6, placement="inplace", chunk_min=2, chunk_max=3, epochs=2, hint_keep=1.0,
    )  # fmt: skip
    made, modules = context(algorithm, policy)
    optimizer = torch.optim.AdamW(modules["policy"].parameters(), lr=1e-2)
    prompt, failures = torch.tensor([7, 7, 7]), 0

    def rolled(count, ids, fixed=None):
        found = sample(
            policy, [prompt] * count, config, seed=seed, sequence_ids=ids, fixed_ids=fixed
        )
        for t in found:
            t.correct = right(t.response_ids)
            t.reward = float(t.correct)
        return found

    for iteration in range(iterations):
        ids = [1000 * iteration + i for i in range(GROUP)]
        group = Group(task_id=0, prompt_ids=prompt, trajectories=rolled(GROUP, ids), trace="x")
        for t in group.trajectories:
            t.group_id = iteration
        failures += not any(t.correct for t in group.trajectories)

        def resample(requests, iteration=iteration):
            again = [1000 * iteration + 500 + i for i in range(GROUP)]
            fixed = [list(r.fixed_ids) if r.fixed_ids is not None else None for r in requests]
            return [rolled(r.count, again, f) for r, f in zip(requests, fixed, strict=True)]

        groups = algorithm.refine([group], resample)
        made.metrics.clear()
        for update in algorithm.updates(algorithm.prepare(groups, made), made):
            if not update.micros:
                continue
            sum(algorithm.loss(micro, policy)[0] for micro in update.micros).backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = any(not torch.equal(t, before[name]) for name, t in policy.state_dict().items())
    return failures / iterations, moved


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hints_rescue_what_sampling_cannot(seed):
    """GRPO sees no right rollout and stays where it is; IGPO learns from the first hints on."""
    assert all_wrong("none", seed, iterations=6) == (1.0, False)
    assert all_wrong("resample", seed, iterations=6) == (1.0, False)
    share, moved = all_wrong("inpaint", seed)
    assert moved and share <= 0.5


# --- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 1}, "at least 2"),
        ({"eta_low": 0.7}, "algorithm.eta_low"),
        ({"eta_high": 1.1}, "algorithm.eta_high"),
        ({"chunk_min": 0}, "algorithm.chunk_min"),
        ({"chunk_min": 11}, "must not exceed algorithm.chunk_max"),
        ({"max_replaced": 0.0}, "algorithm.max_replaced"),
        ({"max_replaced": 1.2}, "algorithm.max_replaced"),
        ({"max_replaced": 0.1}, "is none"),
        ({"hint_keep": 0.0}, "algorithm.hint_keep"),
        ({"hint_keep": 1.5}, "algorithm.hint_keep"),
        ({"tail": -1}, "algorithm.tail"),
        ({"guidance": "pray"}, "algorithm.guidance must be one of"),
        ({"mini_batch": 9}, "multiple of"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)


def test_a_tail_that_fills_the_window():
    with pytest.raises(ValueError, match="no room for hints"):
        build(tiny(), tail=12)
    assert build(tiny(), tail=12, guidance="none").config.tail == 12


def test_block_models_are_refused():
    policy = tiny(kind="block", block_size=4)
    algorithm = build(policy)
    made, _ = context(algorithm, policy)
    with pytest.raises(ValueError, match="needs full attention"):
        algorithm.prepare(rollouts(policy), made)


def test_the_released_setting():
    config = Config(**IGPO_RELEASE)
    assert config.ratio_mask == "all" and config.count_round == "ceil" and not config.cut_answer
    assert replace(config, group_size=4).most_replaced == 2
