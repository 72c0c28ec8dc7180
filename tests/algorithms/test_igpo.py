"""IGPO's loss on tiny models: shared forwards, what enters the loss, options."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from igpo_toys import build, rollouts, tiny
from trace_toys import context

from dlm_fast.algorithms.group_ratio import agg_divisor, averaged, divergence, objective
from dlm_fast.algorithms.igpo import Config
from dlm_fast.algorithms.igpo_options import IGPO_RELEASE
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility


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
