"""Slopes, ratios and their intervals: on noise whose truth is known."""

import math
from dataclasses import replace

import pytest
import torch

from dlm_fast.training.gradient_noise import GradientSums
from dlm_fast.training.noise_statistics import Cell, Estimate, log_ratio, mean, slope


def cell(n, variance, error=0.0, sampler="l_iid", **fields):
    known = {"repetitions": 8, "bias_squared": 0.0, "unseen": 0.0} | fields
    return Cell(sampler=sampler, num_samples=n, variance=variance, variance_error=error, **known)


@pytest.mark.parametrize("power", [-1.0, -1.7, 0.0])
def test_slope_of_a_power_law(power):
    cells = [cell(n, 3.0 * n**power) for n in (1, 2, 4, 32)]
    assert slope(cells).value == pytest.approx(power / 2, abs=1e-12)
    assert slope(cells).error == 0


def test_slope_error_is_that_of_the_moved_points():
    """Each point moved by its error alone moves the slope by its share; the shares add up."""
    cells = [cell(n, 1.0 / n, error=0.1 * n**-0.8) for n in (1, 2, 4, 8)]
    moved = []
    for i, one in enumerate(cells):
        small = 1e-6 * one.variance_error
        other = replace(one, variance=one.variance + small)
        changed = slope([*cells[:i], other, *cells[i + 1 :]])
        moved.append((changed.value - slope(cells).value) * 1e6)
    assert slope(cells).error == pytest.approx(math.hypot(*moved), rel=1e-4)


def test_two_points_make_a_slope_and_one_does_not():
    assert slope([cell(2, 4.0), cell(8, 1.0)]).value == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="two different numbers of samples, got \\[4, 4\\]"):
        slope([cell(4, 1.0), cell(4, 2.0)])


def test_ratio_over_the_common_numbers():
    iid = [cell(n, 1.0 / n, error=0.2 / n) for n in (1, 2, 4)]
    pairs = [cell(n, 0.25 / n, error=0.05 / n, sampler="coupled") for n in (2, 4, 8)]
    ratio = log_ratio(pairs, iid)
    assert ratio.exp()[0] == pytest.approx(0.5)
    assert ratio.error == pytest.approx(math.sqrt(2 * 2 * 0.1**2) / 2)
    assert ratio.exp()[1] < 0.5 < ratio.exp()[2]
    assert log_ratio(pairs, [cell(1, 1.0)]) is None


def test_mean_and_interval():
    found = mean([Estimate(value=1.0, error=0.3), Estimate(value=3.0, error=0.4)])
    assert found == Estimate(value=2.0, error=0.25)
    assert found.interval == pytest.approx((2 - 0.49, 2 + 0.49))
    with pytest.raises(ValueError, match="no estimates"):
        mean([])


def test_noise_without_variance_has_no_logarithm():
    with pytest.raises(ValueError, match="l_iid at n=4 does not change with the masks"):
        _ = cell(4, 0.0).log_noise


def test_distance_counts_the_bias_once():
    assert cell(4, 3.0, bias_squared=1.0).distance == 2
    assert cell(4, 3.0, bias_squared=-1.0).distance == pytest.approx(math.sqrt(2))


def stack_of(repetitions, seed, rank=3, size=40):
    """Heavy-tailed gradients whose noise has few directions, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linspace(1, 0.2, rank, dtype=torch.float64)
    noise = torch.randn(repetitions, rank, generator=generator, dtype=torch.float64)
    noise *= torch.rand(repetitions, 1, generator=generator, dtype=torch.float64) * math.sqrt(3)
    stack = torch.full((repetitions, size), 0.5, dtype=torch.float64)
    stack[:, :rank] += noise * directions
    return stack, directions.square().sum().item()


def sums_of(stack, centre):
    centre = centre.to(torch.float64)
    parameters = [torch.zeros(7, dtype=torch.float64), torch.zeros(33, dtype=torch.float64)]
    sums = GradientSums(parameters)
    for gradient in stack:
        for parameter, part in zip(parameters, (gradient[:7], gradient[7:]), strict=True):
            parameter.grad = part.clone()
        sums.add([centre[:7], centre[7:]])
    return sums


def test_variance_is_that_of_the_explicit_stack():
    stack, _ = stack_of(9, seed=0)
    sums = sums_of(stack, torch.full((40,), 0.25))
    assert sums.variance == pytest.approx(stack.var(0).sum().item(), rel=1e-10)
    assert sums.squares == pytest.approx((stack - 0.25).square().sum(1).tolist())
    assert torch.allclose(torch.cat(sums.mean), stack.mean(0), rtol=0, atol=1e-12)
    sums.zero()
    assert sums.squares == [] and not torch.cat(sums._accumulator.main_grads).any()


def test_its_error_is_that_of_the_delete_one_jackknife():
    stack, _ = stack_of(60, seed=1)
    left_out = torch.stack([torch.cat([stack[:r], stack[r + 1 :]]).var(0).sum() for r in range(60)])
    jackknife = math.sqrt(59 / 60 * (left_out - left_out.mean()).square().sum())
    sums = sums_of(stack, torch.full((40,), 0.5))
    assert math.sqrt(sums.variance_error_squared) == pytest.approx(jackknife, rel=0.1)


def test_a_parameter_without_gradient_counts_as_zero():
    parameters = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    sums = GradientSums(parameters)
    for value in (1.0, 3.0):
        parameters[0].grad = torch.full((2,), value, dtype=torch.float64)
        sums.add([torch.ones(2), torch.full((2,), 2.0)])
    assert sums.squares == pytest.approx([8.0, 16.0])
    assert sums.variance == pytest.approx(4.0)


def test_intervals_cover_the_truth():
    """95 % intervals of slope and ratio over a batch of six responses, 12 repetitions."""
    trials, covered = 100, {"slope": 0, "ratio": 0}
    sums = GradientSums([torch.zeros(1)])
    for trial in range(trials):
        cells = {}
        for k, (name, factor) in enumerate((("l_iid", 1.0), ("coupled", 0.8))):
            for n in (2, 4, 8, 16):
                variance = error = 0.0
                for response in range(6):
                    seed = response + 10 * (n + 100 * (k + 2 * trial))
                    stack, _ = stack_of(12, seed, size=3)
                    scaled = (stack - 0.5) * factor / math.sqrt(n)
                    sums.squares = scaled.square().sum(1).tolist()
                    variance += scaled.var(0).sum().item()
                    error += sums.variance_error_squared
                cells.setdefault(name, []).append(cell(n, variance, math.sqrt(error)))
        low, high = slope(cells["l_iid"]).interval
        covered["slope"] += low <= -0.5 <= high
        _, low, high = log_ratio(cells["coupled"], cells["l_iid"]).exp()
        covered["ratio"] += low <= 0.8 <= high
    assert covered["slope"] >= 0.88 * trials, covered
    assert covered["ratio"] >= 0.88 * trials, covered
