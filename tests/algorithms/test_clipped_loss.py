"""Clipped objectives, KL estimates, value loss and averaging: oracles T7 to T9."""

from __future__ import annotations

import pytest
import torch

from dlm_fast.algorithms.clipped_loss import (
    averaging,
    clipped_objective,
    clipped_value_loss,
    kl_estimate,
)

D = [0, 0.1, 0.3, -0.3, -0.1, 0.3]


def values_and_slopes(function, at):
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = function(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.tolist(), slope.tolist()


def test_policy_oracle():
    advantage = torch.tensor([1, 1, 1, 1, -1, -1], dtype=torch.float64)
    value, slope = values_and_slopes(lambda d: clipped_objective(d, advantage, 0.2, 0.2), D)
    assert value == pytest.approx([1, 1.105171, 1.2, 0.740818, -0.904837, -1.349859], abs=1e-6)
    expected = [1, 1.105171, 0, 0.740818, -0.904837, -1.349859]
    assert slope == pytest.approx(expected, abs=1e-6)
    minus = torch.tensor([-1.0], dtype=torch.float64)
    value, slope = values_and_slopes(lambda d: clipped_objective(d, minus, 0.2, 0.2), [-0.3])
    assert value == pytest.approx([-0.8]) and slope == [0]


def test_dual_clip_oracle():
    """clip-higher and dual clip of DAPO and TreePO: low 0.2, high 0.28, c 10."""
    ratios = [0.5, 0.9, 1.2, 1.3, 9.0, 11.0]
    log_ratio = torch.tensor(ratios).double().log().tolist()
    for sign, expected, moves in (
        (1, [0.5, 0.9, 1.2, 1.28, 1.28, 1.28], [1, 1, 1, 0, 0, 0]),
        (-1, [-0.8, -0.9, -1.2, -1.3, -9.0, -10.0], [0, 1, 1, 1, 1, 0]),
    ):
        advantage = torch.full((6,), float(sign), dtype=torch.float64)
        value, slope = values_and_slopes(
            lambda d, a=advantage: clipped_objective(d, a, 0.2, 0.28, 10), log_ratio
        )
        assert value == pytest.approx(expected, abs=1e-6)
        slopes = [sign * m * r for m, r in zip(moves, ratios, strict=True)]
        assert slope == pytest.approx(slopes, abs=1e-6)


def test_log_ratios_are_bounded():
    one = torch.ones(2, dtype=torch.float64)
    value, slope = values_and_slopes(lambda d: clipped_objective(d, -one, 0.2, 0.2), [1e4, -1e4])
    assert all(abs(v) < 3e4 for v in value) and slope == [0, 0]
    assert all(v < 3e4 for v in kl_estimate(torch.tensor([1e4, -1e4]), "k3").tolist())


def test_kl_oracle():
    assert values_and_slopes(lambda d: kl_estimate(d, "k1"), D)[1] == [1] * 6
    value, slope = values_and_slopes(lambda d: kl_estimate(d, "k2"), D)
    assert value == pytest.approx([0, 0.005, 0.045, 0.045, 0.005, 0.045])
    assert slope == pytest.approx(D)
    value, slope = values_and_slopes(lambda d: kl_estimate(d, "k3"), D)
    expected = [0, 0.004837, 0.040818, 0.049859, 0.005171, 0.040818]
    assert value == pytest.approx(expected, abs=1e-6)
    assert slope[:4] == pytest.approx([0, 0.095163, 0.259182, -0.349859], abs=1e-6)


def test_value_oracle():
    value = torch.tensor([0.5, 0.9, 0.9, 0.1], dtype=torch.float64)
    target = torch.tensor([1, 1, 0.2, 1], dtype=torch.float64)
    found = clipped_value_loss(value, torch.full_like(value, 0.4), target, 0.2)
    assert found.tolist() == pytest.approx([0.125, 0.08, 0.245, 0.405])


@pytest.mark.parametrize(
    ("agg", "expected"),
    [
        ("step_mean", 4),
        ("slice_mean", 2),
        ("slice_len", 0.6),
        ("token_mean", 2),
        ("seq_mean_len", 2),
    ],
)
def test_averaging_oracle(agg, expected):
    """T9: one response of three tokens, revealed in steps 1, 1, 2; A = 2."""
    step = torch.tensor([1, 1, 2])
    share, divisor = averaging(agg, torch.zeros(3, dtype=torch.long), step, step, padded_length=5)
    assert float((share * 2).sum() / divisor) == pytest.approx(expected)


def test_averaging_over_responses():
    sequence = torch.tensor([0, 0, 0, 1])
    step = torch.tensor([1, 1, 2, 5])
    term = torch.tensor([1.0, 2, 4, 8])
    means = {
        name: float((share * term).sum() / divisor)
        for name in ("token_mean", "seq_mean_len", "step_mean", "slice_mean")
        for share, divisor in [averaging(name, sequence, step, step)]
    }
    assert means == pytest.approx(
        {
            "token_mean": 15 / 4,
            "seq_mean_len": (7 / 3 + 8) / 2,
            "step_mean": (1.5 + 4 + 8) / 2,
            "slice_mean": (1.5 + 4 + 8) / 3,
        }
    )
    with pytest.raises(ValueError, match="padded length"):
        averaging("slice_len", sequence, step, step)
