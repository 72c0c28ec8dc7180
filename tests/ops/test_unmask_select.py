"""Unmasking rules: published decodings, the twin, ties, NaN, keyed order, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from unmask_problems import inf, nan, problems

from dlm_fast.ops import Rng, Stream, philox_uniform, unmask_select, unmask_select_ref
from dlm_fast.ops.unmask_select import BOUND_RULES, QUOTA_RULES, RULES, UNCERTAINTY_RULES


def row(values, dtype=torch.float32):
    return torch.tensor([values], dtype=dtype)


def select(values, rule, selectable=None, **options):
    """Revealed positions of one row, checked against the twin."""
    score = row(values)
    open_RL = torch.ones_like(score, dtype=torch.bool) if selectable is None else row(selectable)
    if "uncertainty" in options:
        options["uncertainty"] = row(options["uncertainty"])
    chosen = unmask_select(score, open_RL.bool(), rule, **options)
    assert torch.equal(chosen, unmask_select_ref(score, open_RL.bool(), rule, **options))
    return chosen[0].nonzero()[:, 0].tolist()


def schedule(size, steps):
    quota, rest = divmod(size, steps)
    return [quota + (t < rest) for t in range(steps)]


def decode(confidence, rule, steps, **options):
    """Step at which each position is revealed when the confidences never change."""
    score = row(confidence)
    masked = torch.ones_like(score, dtype=torch.bool)
    step_map = torch.zeros(score.shape, dtype=torch.int64)
    quotas = schedule(len(confidence), steps)
    step = 0
    while masked.any():
        quota = quotas[min(step, steps - 1)]
        chosen = unmask_select(score, masked, rule, quota=quota, **options)
        assert chosen.any() and not (chosen & ~masked).any()
        step += 1
        step_map[chosen] = step
        masked &= ~chosen
    return step_map[0].tolist()


FOUR = [0.95, 0.40, 0.92, 0.70]
EIGHT = [0.99, 0.2, 0.95, 0.6, 0.97, 0.91, 0.3, 0.5]


@pytest.mark.parametrize(
    ("confidence", "rule", "steps", "bound", "expected"),
    [
        (FOUR, "top_k", 4, None, [1, 4, 2, 3]),
        (FOUR, "top_k", 2, None, [1, 2, 1, 2]),
        (FOUR, "top_k", 3, None, [1, 3, 1, 2]),
        (FOUR, "dynamic", 4, 0.9, [1, 3, 1, 2]),
        (FOUR, "dynamic", 2, 0.9, [1, 2, 1, 2]),
        (FOUR, "sequential", 4, None, [1, 2, 3, 4]),
        (FOUR, "sequential", 2, None, [1, 1, 2, 2]),
        (EIGHT, "dynamic", 4, 0.9, [1, 3, 1, 2, 1, 1, 3, 2]),
        (EIGHT, "dynamic", 8, 0.9, [1, 5, 1, 2, 1, 1, 4, 3]),
        (EIGHT, "top_k", 3, None, [1, 3, 1, 2, 1, 2, 3, 2]),
    ],
)
def test_decodings_of_the_trace_spec(confidence, rule, steps, bound, expected):
    assert decode(confidence, rule, steps, bound=bound) == expected


def test_schedules():
    assert schedule(8, 3) == [3, 3, 2] and schedule(10, 4) == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("confidence", "count"),
    [
        ([0.99, 0.97, 0.90, 0.60], 3),
        ([0.99, 0.97, 0.90, 0.85], 4),
        ([0.99, 0.9, 0.8, 0.5], 3),
        ([0.3, 0.2, 0.1], 1),
        ([0.3, 0.2], 1),
        ([0.3], 1),
        ([1.0 + 1e-6, 1.0, 1.0], 3),
    ],
)
def test_factor(confidence, count):
    assert select(confidence, "factor", bound=1.0) == list(range(count))
    # the rule sees an order, not places
    assert len(select(confidence[::-1], "factor", bound=1.0)) == count


def test_entropy_sum():
    entropy = [0.05, 0.1, 0.3, 0.9]
    assert select(entropy, "entropy_sum", uncertainty=entropy, bound=0.35) == [0, 1]
    # the EB-sampler leaves the largest out of the sum: one more
    assert select(entropy, "eb", uncertainty=entropy, bound=0.35) == [0, 1, 2]
    assert select(entropy, "entropy_sum", uncertainty=entropy, bound=0.0) == [0]
    # the sum must stay below the bound, not reach it
    halves = [0.5, 0.25, 0.25]
    assert select(halves, "entropy_sum", uncertainty=halves, bound=0.5) == [1]
    assert select(halves, "entropy_sum", uncertainty=halves, bound=0.5001) == [1, 2]


@pytest.mark.parametrize(
    ("entropy", "bound", "count"),
    [
        ([0.05, 0.2, 0.4, 1.0], 0.3, 3),
        ([0.05, 0.2, 0.4, 1.0], 0.0, 1),
        ([0.05, 0.2, 0.4, 1.0], 0.7, 4),
        ([0.0, 0.0, 0.0, 0.5, 1.0], 0.0, 4),
        ([-1e-7, 0.0, 0.3], 0.0, 3),
        ([-0.1, 0.05, 0.2], 0.0, 2),  # what rounding leaves below zero buys nothing
    ],
)
def test_eb(entropy, bound, count):
    assert select(entropy, "eb", uncertainty=entropy, bound=bound) == list(range(count))
    assert len(select(entropy[::-1], "eb", uncertainty=entropy[::-1], bound=bound)) == count


def test_threshold():
    assert select([0.5, 0.3, 0.2], "threshold", bound=0.9) == [0]
    assert select([0.2, 0.3, 0.5], "threshold", bound=0.9) == [2]
    assert select([0.2, 0.3, 0.5], "threshold", bound=0.0) == [0, 1, 2]
    for values in ([0.9, 1.0, 0.2], [1.0, 1.0]):
        assert select(values, "threshold", bound=1.5) == select(values, "top_k", quota=1)
    # at the bound: threshold takes it, dynamic does not; both in the precision of the score
    assert select([0.9, 0.1, 0.9], "threshold", bound=0.9) == [0, 2]
    assert select([0.9, 0.1, 0.95], "dynamic", bound=0.9, quota=1) == [2]
    assert select([0.9, 0.1, 0.9], "dynamic", bound=0.9, quota=1) == [0]


def test_ties_go_to_the_lowest_index():
    flat = [0.5] * 6
    for rule, options in [
        ("top_k", {"quota": 2}),
        ("dynamic", {"quota": 2, "bound": 0.9}),
        ("factor", {"bound": 1.51}),
        ("entropy_sum", {"bound": 1.01, "uncertainty": flat}),
        ("eb", {"bound": 0.5, "uncertainty": flat}),
        ("sequential", {"quota": 2}),
    ]:
        assert select(flat, rule, **options) == [0, 1], rule
        assert select(flat, rule, selectable=[0, 1, 0, 1, 1, 1], **options) == [1, 3], rule
    assert select(flat, "threshold", bound=0.9, selectable=[0, 0, 1, 1, 0, 0]) == [2]


def options_for(rule, length, rows=1):
    options = {}
    if rule in QUOTA_RULES:
        options["quota"] = 2
    if rule in BOUND_RULES:
        options["bound"] = 0.6
    if rule in UNCERTAINTY_RULES:
        options["uncertainty"] = torch.linspace(0.1, 1.0, rows * length).reshape(rows, length)
    if rule == "random":
        options["rng"] = Rng.of(0, Stream.UNMASK, list(range(rows)))
    return options


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_candidates_and_with_one(rule):
    score = torch.rand(3, 5)
    open_RL = torch.zeros(3, 5, dtype=torch.bool)
    open_RL[1, 3] = True
    chosen = unmask_select(score, open_RL, rule, **options_for(rule, 5, 3))
    # one mask left and a quota of two: exactly one reveal
    assert torch.equal(chosen, open_RL)
    for shape in [(0, 5), (3, 0), (0, 0)]:
        empty = unmask_select(
            torch.empty(shape), torch.empty(shape, dtype=torch.bool), rule,
            **options_for(rule, shape[1], shape[0]),
        )  # fmt: skip
        assert empty.shape == shape and empty.dtype == torch.bool


@pytest.mark.parametrize("rule", RULES)
def test_nan_is_passed_over_unless_nothing_else_is_left(rule):
    options = options_for(rule, 4) | ({"quota": 4} if rule in QUOTA_RULES else {"bound": 100.0})
    if rule in BOUND_RULES & QUOTA_RULES:
        options["bound"] = 0.0
    if rule == "threshold":
        options["bound"] = 0.0
    score = row([nan, 0.4, nan, 0.9])
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert unmask_select(score, everything, rule, **options).tolist() == [[0, 1, 0, 1]]
    only_nan = row([1, 0, 1, 0]).bool()
    assert unmask_select(score, only_nan, rule, **options).tolist() == [[1, 0, 0, 0]]
    last = row([0, 0, 1, 0]).bool()
    assert unmask_select(score, last, rule, **options).tolist() == [[0, 0, 1, 0]]
    if rule in UNCERTAINTY_RULES:
        options["uncertainty"] = row([0.1, nan, 0.1, 0.1])
        assert unmask_select(score, everything, rule, **options).tolist() == [[0, 0, 0, 1]]


def test_infinite_scores_keep_their_order():
    values = [-inf, 0.1, inf, -inf]
    assert select(values, "top_k", quota=1) == [2]
    assert select(values, "top_k", quota=3) == [0, 1, 2]
    assert select(values, "threshold", bound=inf) == [2]


@settings(max_examples=400, deadline=None)
@given(problems())
def test_equals_the_definition(problem):
    score, selectable, rule, options = problem
    chosen = unmask_select(score, selectable, rule, **options)
    assert torch.equal(chosen, unmask_select_ref(score, selectable, rule, **options))
    assert not (chosen & ~selectable).any()
    assert torch.equal(chosen.any(1), selectable.any(1)), "one reveal at least in every open row"
    if rule in QUOTA_RULES - {"dynamic"}:
        assert (chosen.sum(1) <= options["quota"]).all()


@settings(max_examples=60, deadline=None)
@given(problems())
def test_rows_do_not_depend_on_the_batch(problem):
    score, selectable, rule, options = problem
    whole = unmask_select(score, selectable, rule, **options)
    for r in range(score.shape[0]):
        one = {k: v[[r]] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        one["rng"] = options["rng"].take([r])
        assert torch.equal(unmask_select(score[[r]], selectable[[r]], rule, **one)[0], whole[r])


def test_strided_input():
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(12, 7, generator=generator).t()[:, ::2]
    selectable = (torch.rand(6, 7, generator=generator) < 0.7).t()
    quota = torch.arange(1, 15, dtype=torch.int32)[::2]
    for rule in ("top_k", "dynamic"):
        options = {"quota": quota, "bound": 0.8}
        expected = unmask_select_ref(score, selectable, rule, **options)
        assert torch.equal(unmask_select(score, selectable, rule, **options), expected)


def test_random_order_is_that_of_the_keyed_words():
    rng = Rng.of(5, Stream.UNMASK, [10, 11]).at(position=torch.tensor([64, 96]), step=7, draw=2)
    selectable = torch.ones(2, 30, dtype=torch.bool)
    score = torch.zeros(2, 30)
    # 23 of the 32 bits are those of the uniform numbers, so their order agrees unless they tie
    order = philox_uniform(rng, 30).argsort(dim=1)
    for quota in (1, 4, 29, 30):
        chosen = unmask_select(score, selectable, "random", quota=quota, rng=rng)
        expected = torch.zeros_like(selectable).scatter(1, order[:, :quota], True)
        assert torch.equal(chosen, expected)


def test_random_is_uniform_and_differs_between_steps():
    rows = 4000
    rng = Rng.of(0, Stream.UNMASK, list(range(rows)))
    selectable = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool).expand(rows, 6)
    score = torch.zeros(rows, 6)
    chosen = unmask_select(score, selectable, "random", quota=2, rng=rng.at(step=1))
    # each of the ten pairs of candidates has probability 1/10
    pair = (chosen * (2 ** torch.arange(6))).sum(1)
    counts = pair.unique(return_counts=True)[1].double()
    assert counts.numel() == 10
    chi_square = float(((counts - rows / 10) ** 2 / (rows / 10)).sum())
    assert chi_square < 9 + 5 * math.sqrt(18)
    other = unmask_select(score, selectable, "random", quota=2, rng=rng.at(step=2))
    assert 0.05 < float((chosen == other).all(1).double().mean()) < 0.15


def test_thread_count_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(300, 40, generator=generator)
    selectable = torch.rand(300, 40, generator=generator) < 0.5
    before = torch.get_num_threads()
    try:
        for rule in RULES:
            options = options_for(rule, 40, 300)
            torch.set_num_threads(1)
            one = unmask_select(score, selectable, rule, **options)
            torch.set_num_threads(3)
            assert torch.equal(unmask_select(score, selectable, rule, **options), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rule", ["top_k", "dynamic", "eb", "random"])
def test_opcheck(rule):
    counters = (torch.tensor([1, 2]), torch.tensor([3, 4], dtype=torch.int32), None, 5)
    quota = torch.tensor([1, 2], dtype=torch.int32) if rule in QUOTA_RULES else None
    bound = torch.tensor([0.5, 0.9]) if rule in BOUND_RULES else None
    uncertainty = torch.rand(2, 5) if rule in UNCERTAINTY_RULES else None
    args = (torch.rand(2, 5), torch.rand(2, 5) < 0.7, RULES.index(rule), quota, bound, uncertainty)
    torch.library.opcheck(torch.ops.dlm_fast.unmask_select, (*args, *counters))


def test_bad_input():
    score, selectable = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)

    def fails(error, match, *args, **options):
        with pytest.raises(error, match=match):
            unmask_select(*args, **options)

    fails(ValueError, "did you mean 'threshold'", score, selectable, "treshold", bound=0.9)
    fails(ValueError, "rule must be one of", score, selectable, None)
    fails(TypeError, "score must be float", selectable, selectable, "top_k", quota=1)
    fails(TypeError, "selectable must be bool", score, score, "top_k", quota=1)
    fails(ValueError, r"one shape \[R, L\]", score, selectable[:, :2], "top_k", quota=1)
    fails(ValueError, r"one shape \[R, L\]", score[0], selectable[0], "top_k", quota=1)
    for rule in sorted(QUOTA_RULES):
        options = options_for(rule, 3, 2)
        fails(ValueError, "needs quota", score, selectable, rule, **options | {"quota": None})
        fails(ValueError, "at least 1, got 0", score, selectable, rule, **options | {"quota": 0})
        low = torch.tensor([1, -1])
        fails(ValueError, "got -1 in row 1", score, selectable, rule, **options | {"quota": low})
        short = torch.tensor([1])
        fails(ValueError, r"shape \[2\]", score, selectable, rule, **options | {"quota": short})
    fails(TypeError, "quota must be an integer", score, selectable, "top_k", quota=1.5)
    fails(TypeError, "quota must be int32", score, selectable, "top_k", quota=torch.ones(2))
    for rule in sorted(BOUND_RULES):
        options = options_for(rule, 3, 2)
        fails(ValueError, "needs bound", score, selectable, rule, **options | {"bound": None})
        for wrong in (-0.1, nan):
            fails(ValueError, "bound must", score, selectable, rule, **options | {"bound": wrong})
        wrong = torch.tensor([0.5, nan])
        fails(ValueError, "nan in row 1", score, selectable, rule, **options | {"bound": wrong})
        short = torch.tensor([0.5])
        fails(ValueError, r"shape \[2\]", score, selectable, rule, **options | {"bound": short})
    fails(ValueError, "needs uncertainty", score, selectable, "eb", bound=0.5)
    short = score[:, :2]
    fails(ValueError, "shape", score, selectable, "eb", bound=0.5, uncertainty=short)
    fails(ValueError, "needs rng", score, selectable, "random", quota=1)
    rng = Rng.of(0, Stream.UNMASK, [0, 1, 2])
    fails(ValueError, "2 rows as score, got 3", score, selectable, "random", quota=1, rng=rng)
    # a quota of zero is no mistake where a row is already finished
    finished = torch.tensor([[True] * 3, [False] * 3])
    zero = torch.tensor([1, 0])
    assert unmask_select(score, finished, "top_k", quota=zero).sum() == 1


def test_devices_must_agree():
    score, selectable = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    away = torch.ones(2, device="meta")
    rng = Rng.of(0, Stream.UNMASK, [0, 1]).to("meta")
    for rule, options, name in [
        ("top_k", {"quota": away.int()}, "quota"),
        ("threshold", {"bound": away}, "bound"),
        ("eb", {"bound": 0.5, "uncertainty": score.to("meta")}, "uncertainty"),
        ("random", {"quota": 1, "rng": rng}, "rng"),
    ]:
        with pytest.raises(ValueError, match=f"{name} lies on meta; move it"):
            unmask_select(score, selectable, rule, **options)
    # what a rule does not use may lie anywhere
    assert unmask_select(score, selectable, "top_k", quota=1, bound=away, rng=rng).sum() == 2


@pytest.mark.parametrize("rule", RULES)
def test_nothing_waits_for_a_device(rule):
    """A fake tensor has no values: whoever reads one raises."""
    with FakeTensorMode():
        keys = torch.zeros(2, dtype=torch.int64, device="cuda")
        score = torch.zeros(2, 3, device="cuda")
        options = {
            "quota": torch.ones(2, dtype=torch.int64, device="cuda"),
            "bound": torch.ones(2, device="cuda"),
            "uncertainty": torch.zeros(2, 3, dtype=torch.bfloat16, device="cuda"),
            "rng": Rng(keys).at(position=keys + 3, step=3),
        }
        chosen = unmask_select(score, score > 0, rule, **options)
        assert chosen.device == score.device and chosen.dtype == torch.bool
        assert chosen.shape == score.shape
