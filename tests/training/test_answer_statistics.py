"""pass@k, votes and intervals against their definitions by enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.training.answer_statistics import (
    Verdict,
    bootstrap_interval,
    counts_of_samples,
    majority,
    majority_at_k,
    pass_at_k,
    wilson_interval,
)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations(range(n), k))
    share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_samples():
    """Against exact whole numbers, where factorials of floats would overflow."""
    for n, right, k in ((10_000, 3, 5_000), (2_000, 1, 1), (5_000, 40, 100)):
        exact = 1 - math.comb(n - right, k) / math.comb(n, k)
        assert pass_at_k(n, right, k) == pytest.approx(exact, rel=1e-12)
    with pytest.raises(ValueError, match="k=5"):
        pass_at_k(4, 1, 5)


def verdicts(text):
    """ "a+ b- ." are three samples: a, right; b, wrong; none."""
    parts = text.split()
    return [Verdict(correct=p[-1] == "+", answer=None if p[0] == "." else p[:-1]) for p in parts]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ("a+ a+ b-", 1.0),
        ("a+ b- b-", 0.0),
        ("a+ b-", 1 / 2),  # a tie: by lot
        ("a+ b- c-", 1 / 3),
        ("a+ b+ c- c- a+ b+", 2 / 3),
        ("a+", 1.0),
        (". . .", 0.0),  # nobody votes
        (". . a+", 1.0),  # a missing answer has no vote
        ("a+ a- b-", 1 / 2),  # one answer, two verdicts: their mean
    ],
)
def test_majority(samples, expected):
    assert majority(verdicts(samples)) == pytest.approx(expected)


def test_majority_of_k_is_the_mean_over_disjoint_groups():
    samples = verdicts("a+ b- b- b- a+ a+ b-")
    assert majority_at_k(samples, 1) == pytest.approx(3 / 7)
    assert majority_at_k(samples, 2) == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert majority_at_k(samples, 3) == pytest.approx((0 + 1) / 2)
    assert majority_at_k(samples, 7) == 0.0
    assert counts_of_samples(7) == [1, 2, 4, 7] and counts_of_samples(1) == [1]


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    """200 data sets of 60 draws with p = 0.4; a wrong resampling (one draw, no mean) misses far."""
    generator = np.random.Generator(np.random.PCG64(0))
    covered = 0
    for number in range(200):
        low, high = bootstrap_interval(generator.random(60) < 0.4, seed=number)
        covered += low <= 0.4 <= high
    assert 176 <= covered <= 200, "95 % of 200 are 190; 176 is 4.5 standard deviations below"


def test_bootstrap_equals_the_spread_of_the_mean_and_repeats():
    values = [0.0, 1.0] * 500
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    half = 1.96 * 0.5 / math.sqrt(1000)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.004)
    assert bootstrap_interval([1, 1], seed=0) == (1.0, 1.0)
    narrow = bootstrap_interval(values, seed=3, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_wilson_solves_its_equation():
    for successes, trials in ((0, 20), (3, 20), (20, 20), (250, 500)):
        p = successes / trials
        for bound in wilson_interval(successes, trials):
            if 1e-9 < bound < 1 - 1e-9:
                spread = 1.96 * math.sqrt(bound * (1 - bound) / trials)
                assert abs(bound - p) == pytest.approx(spread, rel=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)
