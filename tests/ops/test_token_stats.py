"""token_stats against its float64 definition: statistics, ties, exact keyed draws, filters."""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import BACKENDS, LEVELS, SHAPES, problem, simd_level, threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.ops import Rng, Stream, token_logprob, token_stats, token_stats_ref

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {"confidence": 1e-5, "lse": 1e-4, "entropy": 2e-4, "margin": 1e-5, "logprob": 1e-4}


def keyed(n, seed=0, **counters):
    rng = Rng.of(seed, Stream.TOKEN, list(range(n))).to(torch.get_default_device())
    return rng.at(**counters)


def assert_close(p, with_targets=True, **options):
    targets = p.targets if with_targets else None
    exact = p.exact()
    options |= {"rows": p.rows}
    ours = token_stats(p.hidden, p.weight, targets, bias=p.bias, **options)
    truth = token_stats_ref(exact.hidden, exact.weight, targets, bias=exact.bias, **options)
    assert ours.token.dtype == torch.int64
    # Tokens may differ only where the two best scores are next to equal: not in these problems.
    assert torch.equal(ours.token, truth.token)
    for name, tolerance in TOLERANCE.items():
        value, expected = getattr(ours, name), getattr(truth, name)
        assert value.dtype == torch.float32 and value.shape == ours.token.shape
        assert not len(value) or float((value - expected).abs().max()) < tolerance, name
    return ours


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_argmax_and_statistics(shape, dtype):
    assert_close(problem(*shape, dtype), with_targets=shape[0] % 2 == 0)


@pytest.mark.every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_equal_the_definition(shape):
    p = problem(*shape)
    rng = keyed(shape[0], position=p.rows, step=3, draw=5)
    assert_close(p, temperature=1.3, rng=rng)


@pytest.mark.parametrize("level", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_instruction_set(level, dtype):
    with simd_level(level):
        p = problem(43, 123, 2781, dtype, bias=True)
        p.targets[p.targets == 3] = 4
        options = {"forbid_ids": [3, 2780]}
        assert_close(p, **options)
        assert_close(p, temperature=0.8, rng=keyed(43), **options)
        assert_close(p, temperature=0.8, rng=keyed(43), top_k=5, top_p=0.8, **options)


@pytest.mark.every_backend
def test_float64_is_exact():
    p = problem(30, 70, 700, torch.float64, bias=True)
    for options in ({}, {"temperature": 2.0, "rng": keyed(30)}):
        arguments = {"rows": p.rows, "bias": p.bias, **options}
        ours = token_stats(*p.head, **arguments)
        truth = token_stats_ref(*p.head, **arguments)
        assert torch.equal(ours.token, truth.token)
        for name in TOLERANCE:
            assert getattr(ours, name).dtype == torch.float64
            assert torch.allclose(getattr(ours, name), getattr(truth, name), rtol=0, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    d=st.integers(1, 40),
    v=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.integers(0, 20),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
)
def test_random_problems(n, d, v, dtype, seed, temperature, top_k, top_p):
    p = problem(n, d, v, dtype, seed=seed)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options["rng"] = keyed(n, seed, step=seed)
    ours = token_stats(p.hidden, p.weight, rows=p.rows, **options)
    exact = p.exact()
    truth = token_stats_ref(exact.hidden, exact.weight, rows=p.rows, **options)
    logits_NV = exact.hidden[p.rows.long()] @ exact.weight.t()
    naive_NV = (p.hidden[p.rows.long()] @ p.weight.t()).float().softmax(-1)
    same = ours.token == truth.token
    # Equal scores to 1e-5 may be decided either way; that is rare.
    assert int((~same).sum()) <= 1
    assert (ours.confidence > 0).all() and (ours.margin >= 0).all()
    naive = naive_NV.gather(1, truth.token[:, None])[:, 0]
    error = (ours.confidence - truth.confidence).abs()[same]
    assert (error <= (naive - truth.confidence).abs()[same].max() + 1e-5).all() if n else True
    assert torch.allclose(ours.lse.double(), logits_NV.logsumexp(-1), atol=1e-4)


def identity_problem(logits_NV):
    return logits_NV.clone(), torch.eye(logits_NV.shape[1])


@pytest.mark.parametrize("level", BACKENDS)
def test_ties_and_extremes(level):
    v = 2100  # more than one cut of the vocabulary
    logits_NV = torch.zeros(5, v)
    logits_NV[1, [7, 2050]] = 5.0
    logits_NV[2, 2099] = 60.0
    logits_NV[3, [2018, 2019]] = 30.0
    logits_NV[4] = -1e4
    logits_NV[4, 3] = 1e4
    with simd_level(level):
        hidden, weight = identity_problem(logits_NV)
        ours = token_stats(hidden, weight)
    assert ours.token.tolist() == [0, 7, 2099, 2018, 3]
    assert ours.margin[[0, 1, 3]].tolist() == [0, 0, 0]
    assert ours.margin[[2, 4]].tolist() == [1, 1]
    assert ours.entropy[0].item() == pytest.approx(math.log(v), abs=2e-6)
    assert ours.entropy[[2, 4]].abs().max() < 1e-6
    assert ours.confidence[0].item() == pytest.approx(1 / v, rel=1e-6)
    assert ours.lse[4].item() == 1e4


@pytest.mark.every_backend
def test_forbidden_columns_take_no_part():
    p = problem(30, 20, 90)
    best = token_stats(p.hidden, p.weight, rows=p.rows).token
    forbidden = sorted(set(best.tolist()))
    p.weight[forbidden[0]] = math.nan  # not even the weights count
    ours = token_stats(p.hidden, p.weight, rows=p.rows, forbid_ids=forbidden)
    allowed = [v for v in range(90) if v not in forbidden]
    small = token_stats(p.hidden, p.weight[allowed], rows=p.rows)
    assert torch.equal(torch.tensor(allowed)[small.token], ours.token)
    for name in TOLERANCE:
        assert torch.allclose(getattr(ours, name), getattr(small, name), atol=1e-6)
    one = token_stats(p.hidden, p.weight, rows=p.rows, forbid_ids=[v for v in range(90) if v != 8])
    assert (one.token == 8).all() and (one.confidence == 1).all() and (one.margin == 1).all()
    assert (one.entropy == 0).all() and (one.logprob == 0).all()


@pytest.mark.parametrize("level", BACKENDS)
def test_a_nan_row_poisons_only_itself(level):
    p = problem(40, 20, 300)
    options = {"rows": p.rows, "forbid_ids": [0]}
    with simd_level(level):
        for draw in (
            {},
            {"temperature": 1.0, "rng": keyed(40)},
            {"temperature": 1.0, "rng": keyed(40), "top_k": 4},
        ):
            clean = token_stats(p.hidden, p.weight, **options, **draw)
            hidden = p.hidden.clone()
            hidden[p.rows[4].long(), 3] = math.nan
            ours = token_stats(hidden, p.weight, **options, **draw)
            kept = torch.arange(40) != 4
            for value, expected in zip(ours, clean, strict=True):
                assert torch.equal(value[kept], expected[kept])
            assert all(value[4].isnan() for value in ours[1:])
            assert ours.token[4] == 1  # the lowest allowed one: a token that exists


@pytest.mark.every_backend
def test_logprob_is_of_targets_or_of_the_token():
    p = problem(50, 30, 200)
    p.targets[::5] = -100
    ours = token_stats(*p.head, rows=p.rows)
    scored = token_logprob(*p.head, rows=p.rows)
    assert torch.equal(ours.logprob, scored.logprob)
    kept = p.targets != -100
    assert torch.equal(ours.lse[kept], scored.lse[kept])
    assert torch.equal(ours.entropy[kept], scored.entropy[kept])
    drawn = token_stats(p.hidden, p.weight, rows=p.rows, temperature=1.0, rng=keyed(50))
    again = token_logprob(p.hidden, p.weight, drawn.token, rows=p.rows)
    assert torch.equal(drawn.logprob, again.logprob)
    assert torch.allclose(drawn.confidence, again.logprob.exp(), rtol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("v", [100, 4099])
@pytest.mark.parametrize("draw", [{}, {"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.9}])
def test_a_row_does_not_depend_on_the_batch(level, v, draw):
    p = problem(150, 35, v, spare=0)
    rng = keyed(150, position=p.rows)
    with simd_level(level):
        whole = token_stats(p.hidden, p.weight, rows=p.rows, rng=rng, **draw)
        for part in [[0], [149], [5, 100], list(range(17)), list(range(149, -1, -1))]:
            alone = token_stats(p.hidden, p.weight, rows=p.rows[part], rng=rng.take(part), **draw)
            assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("top_k", [0, 9])
def test_runs_and_threads_are_bitwise_equal(top_k):
    p = problem(300, 40, 4099)
    results = []
    for count in (1, 1, 2, 5):
        with threads(count):
            results.append(
                token_stats(*p.head, rows=p.rows, temperature=1.0, top_k=top_k, rng=keyed(300))
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def chi_square(tokens, probability):
    counts = torch.bincount(tokens, minlength=len(probability)).double()
    expected = probability * len(tokens)
    used = expected > 0
    assert (counts[~used] == 0).all()
    statistic = float(((counts - expected) ** 2 / expected)[used].sum())
    freedom = int(used.sum()) - 1
    return statistic, freedom


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 1.5, "top_k": 6},
     {"temperature": 1.0, "top_p": 0.7}, {"temperature": 1.0, "top_k": 9, "top_p": 0.8}],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_distribution(level, options):
    """20,000 draws over 16 tokens; five standard deviations of chi-square."""
    generator = torch.Generator().manual_seed(0)
    logits_V = 1.5 * torch.randn(16, generator=generator)
    order = logits_V.argsort(descending=True)
    tempered = (logits_V / options["temperature"]).double()[order]
    kept = torch.arange(16) < options.get("top_k", 16)
    tempered[~kept] = -math.inf
    before = tempered.softmax(0).cumsum(0) - tempered.softmax(0)
    tempered[before >= options.get("top_p", 1.1)] = -math.inf
    probability = torch.zeros(16, dtype=torch.float64).scatter(0, order, tempered.softmax(0))
    hidden = logits_V.expand(20000, 16)
    with simd_level(level):
        tokens = token_stats(hidden, torch.eye(16), rng=keyed(20000), **options).token
    statistic, freedom = chi_square(tokens, probability)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_filters_keep_exactly_what_they_say():
    """Ties go to the lowest id; the smallest set that reaches the mass, at least one token."""
    logits_V = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, -math.inf, 0.5, 2.0]).nan_to_num(neginf=-50)
    hidden, weight = identity_problem(logits_V.expand(4000, 8))
    p = logits_V.double().softmax(0)
    third = (3 * p[1] + 1e-9).item()
    cases = [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 4}, {1, 2, 3, 4}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 6, 7}),
        ({"top_p": 1e-9}, {1}),
        ({"top_p": p[1].item() * 1.01}, {1, 2}),
        ({"top_p": third}, {1, 2, 3, 4}),
        # The mass is that of what top_k left: three equal tokens, two of them hold 0.66.
        ({"top_k": 3, "top_p": 0.66}, {1, 2}),
        ({"top_k": 3, "top_p": 0.67}, {1, 2, 4}),
    ]
    for options, expected in cases:
        tokens = token_stats(hidden, weight, temperature=1.0, rng=keyed(4000), **options).token
        reference = token_stats_ref(
            hidden.double(), weight.double(), temperature=1.0, rng=keyed(4000), **options
        )
        assert set(tokens.tolist()) == expected, options
        assert torch.equal(tokens, reference.token), options


@pytest.mark.every_backend
def test_a_wide_filter_of_a_large_vocabulary():
    """More kept columns than the first sorted stretch."""
    logits_V = torch.randn(5000, generator=torch.Generator().manual_seed(1)) / 10
    hidden = logits_V.repeat(3, 1)
    for options in ({"top_p": 0.9}, {"top_k": 3000}, {"top_k": 3000, "top_p": 0.5}):
        arguments = {"temperature": 1.0, "rng": keyed(3), **options}
        ours = token_stats(hidden, torch.eye(5000), **arguments)
        truth = token_stats_ref(hidden.double(), torch.eye(5000).double(), **arguments)
        assert torch.equal(ours.token, truth.token)


def test_draws_are_named_by_their_counters():
    p = problem(64, 20, 500)
    draws = {
        name: token_stats(p.hidden, p.weight, rows=p.rows, temperature=5.0, rng=rng).token
        for name, rng in [
            ("base", keyed(64)),
            ("again", keyed(64).at(position=0, step=0)),
            ("position", keyed(64).at(position=1)),
            ("step", keyed(64).at(step=1)),
            ("draw", keyed(64).at(draw=1)),
            ("seed", keyed(64, seed=1)),
        ]
    }
    assert torch.equal(draws["base"], draws["again"])
    for name in ("position", "step", "draw", "seed"):
        assert not torch.equal(draws["base"], draws[name])


@pytest.mark.every_backend
def test_no_gradient_and_no_rows():
    p = problem(5, 4, 7).leaves()
    assert not any(x.requires_grad for x in token_stats(*p.head, rows=p.rows))
    empty = token_stats(p.hidden, p.weight, rows=torch.zeros(0, dtype=torch.int64))
    assert all(x.shape == (0,) for x in empty)
    drawn = token_stats(
        p.hidden, p.weight, rows=torch.zeros(0, dtype=torch.int64), temperature=1.0, rng=keyed(0)
    )
    assert drawn.token.shape == (0,)
    everything = token_stats(p.hidden, p.weight)
    assert everything.token.shape == (8,)
