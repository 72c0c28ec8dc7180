"""The losses of whole responses against the published numbers, their gradients, and the filter."""

from __future__ import annotations

import pytest
import torch

from dlm_fast.algorithms.group_ratio import agg_divisor, averaged, divergence, kept_hints, objective

OLD = torch.tensor([[-1.0, -2.0, -0.5, -1.5], [-0.7, -1.1, -2.2, -0.4]], dtype=torch.float64)
NEW = torch.tensor([[-0.8, -2.1, -0.5, -1.0], [-0.9, -1.0, -2.0, -0.6]], dtype=torch.float64)
REF = torch.tensor([[-1.1, -1.9, -0.6, -1.4], [-0.8, -1.2, -2.1, -0.5]], dtype=torch.float64)
ADVANTAGE = torch.tensor([0.5, -0.5], dtype=torch.float64)
KEEP = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]).bool()


def loss(new, level, mask, agg, keep=KEEP, beta=0.01):
    terms = objective(
        new - OLD, ADVANTAGE, keep, level=level, mask=mask, clip_low=0.2, clip_high=0.2
    )
    total = averaged(-terms.gain + beta * divergence(new, REF, keep), keep, agg)
    return total / agg_divisor(keep, agg), terms.ratio


@pytest.mark.parametrize(
    ("level", "mask", "token_mean", "seq_mean", "ratios"),
    [
        (
            "token",
            "kept",
            0.040502,
            -0.035345,
            [[1.221403, 1, 1, 1.648721], [0.818731, 1.105171, 1.221403, 0.818731]],
        ),
        ("sequence", "all", 0.029910, -0.046395, [[1.161834] * 4, [0.975310] * 4]),
        ("sequence", "kept", 0.021731, -0.055937, [[1.262802] * 4, [0.975310] * 4]),
    ],
)
def test_published_numbers(level, mask, token_mean, seq_mean, ratios):
    for agg, expected in (("token_mean", token_mean), ("seq_mean", seq_mean)):
        found, ratio = loss(NEW, level, mask, agg)
        assert found.item() == pytest.approx(expected, abs=1e-6)
    # where a token is not kept its own ratio is 1
    torch.testing.assert_close(ratio, torch.tensor(ratios).double(), rtol=0, atol=1e-6)


def test_the_divergence():
    found = divergence(NEW, REF, torch.ones_like(KEEP))
    expected = [
        [0.040818, 0.021403, 0.004837, 0.070320],
        [0.005171, 0.018731, 0.004837, 0.005171],
    ]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("agg", ["seq_mean", "token_mean"])
def test_gradients_of_filtered_tokens(agg):
    """None where the ratio is over kept tokens; under the released code's ratio there is one."""
    gradients = {}
    for level, mask in (("token", "kept"), ("sequence", "kept"), ("sequence", "all")):
        new = NEW.clone().requires_grad_()
        loss(new, level, mask, agg)[0].backward()
        gradients[level, mask] = new.grad[0, 1].item()
    assert gradients["token", "kept"] == gradients["sequence", "kept"] == 0
    expected = {"seq_mean": -0.072615, "token_mean": -0.062241}[agg]
    assert gradients["sequence", "all"] == pytest.approx(expected, abs=1e-6)


def test_first_steps_are_the_same_for_both_levels():
    """At new = old each kept token's slope is -A / (sequences * kept tokens)."""
    expected = -ADVANTAGE[:, None] / (2 * KEEP.sum(1, keepdim=True)) * KEEP
    for level in ("token", "sequence"):
        new = OLD.clone().requires_grad_()
        loss(new, level, "kept", "seq_mean", beta=0)[0].backward()
        torch.testing.assert_close(new.grad, expected, rtol=0, atol=1e-12)


def test_sequences_without_a_kept_token():
    none = torch.zeros_like(KEEP)
    for agg in ("seq_mean", "token_mean"):
        new = NEW.clone().requires_grad_()
        terms = objective(
            new - OLD, ADVANTAGE, none, level="sequence", mask="kept", clip_low=0.2, clip_high=0.2
        )
        total = averaged(-terms.gain + divergence(new, REF, none), none, agg)
        assert total.item() == 0
        total.backward()
        assert (new.grad == 0).all()


def test_values_behind_the_kept_tokens_do_not_matter():
    wild = NEW.clone()
    wild[0, 1] = float("nan")
    for level in ("token", "sequence"):
        found = loss(wild, level, "kept", "seq_mean")[0]
        assert found.item() == loss(NEW, level, "kept", "seq_mean")[0].item()


@pytest.mark.parametrize(
    ("count", "kept"), [(0, 0), (1, 1), (3, 1), (5, 1), (7, 1), (10, 2), (15, 3), (23, 4)]
)
def test_the_filter_keeps_a_fifth(count, kept):
    generator = torch.Generator().manual_seed(count)
    entropy = torch.rand(40, generator=generator)
    hint = torch.zeros(40).bool()
    hint[torch.randperm(40, generator=generator)[:count]] = True
    found = kept_hints(entropy, hint, 0.2)
    assert int(found.sum()) == kept and not (found & ~hint).any()
    if kept:
        assert entropy[found].min() >= entropy[hint & ~found].max() if count > kept else True
    assert torch.equal(kept_hints(entropy, hint, 1.0), hint)


def test_ties_go_to_the_first():
    hint = torch.ones(10).bool()
    assert kept_hints(torch.ones(10), hint, 0.2).nonzero()[:, 0].tolist() == [0, 1]
