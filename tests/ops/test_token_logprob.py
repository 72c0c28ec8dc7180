"""token_logprob against its float64 definition: values, gradients, selection, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import (
    BACKENDS,
    LEVELS,
    SHAPES,
    cotangents,
    gradient_tolerance,
    problem,
    relative_error,
    simd_level,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.ops import token_logprob, token_logprob_ref
from dlm_fast.ops._executor import executor_of

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def run(p, **options):
    """Outputs and gradients under cotangents on all three outputs."""
    p = p.leaves()
    reference = options.pop("reference", False)
    op = token_logprob_ref if reference else token_logprob
    result = op(*p.head, rows=p.rows, bias=p.bias, **options)
    terms = [
        (out * c.to(out.dtype)).sum()
        for out, c in zip(result, cotangents(len(p.targets)), strict=True)
    ]
    sum(terms).backward()
    gradients = [x.grad for x in (p.hidden, p.weight, p.bias) if x is not None]
    return [r.detach() for r in result], gradients


def assert_close(p, **options):
    ours, gradients = run(p, **options)
    truth, true_gradients = run(p.exact(), reference=True, **options)
    n = len(p.targets)
    for value, exact, largest, mean in zip(
        ours, truth, (1e-4, 1e-4, 2e-4), (1e-5, 1e-5, 2e-5), strict=True
    ):
        assert value.shape == (n,) and value.dtype == torch.float32
        error = (value - exact).abs()
        assert n == 0 or (float(error.max()) < largest and float(error.mean()) < mean)
    # On the CUDA path torch multiplies; its float32 sums over a large vocabulary are the error,
    # and its own operations show its size.
    own_products = p.hidden.is_cpu and executor_of(p.hidden.device) is None
    twins = gradients if own_products else run(p, reference=True, **options)[1]
    for gradient, exact, twin in zip(gradients, true_gradients, twins, strict=True):
        tolerance = gradient_tolerance(gradient, p.weight.dtype)
        if not own_products:
            tolerance = max(tolerance, 3 * relative_error(twin, exact))
        assert relative_error(gradient, exact) < tolerance


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, backend):
    if backend == "emulated" and shape[0] > 1000:
        pytest.skip("long on the emulator; its tests of chunks have fewer rows")
    assert_close(problem(*shape, dtype))


@pytest.mark.parametrize("level", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_instruction_set(level, dtype):
    with simd_level(level):
        p = problem(43, 293, 781, dtype, bias=True)
        p.targets[p.targets == 3] = 4
        assert_close(p, temperature=0.7, forbid_ids=[3, 780])
        assert_close(problem(16, 61, 2500, dtype))
        assert_close(problem(3, 17, 15, dtype, bias=True), temperature=2.0)


@pytest.mark.every_backend
def test_float64_is_exact():
    p = problem(70, 300, 2300, torch.float64, bias=True)
    ours, gradients = run(p, temperature=1.3, forbid_ids=[0, 17])
    truth, true_gradients = run(p, reference=True, temperature=1.3, forbid_ids=[0, 17])
    for value, exact in zip(ours + gradients, truth + true_gradients, strict=True):
        assert value.dtype == torch.float64
        assert relative_error(value, exact) < 1e-13


@pytest.mark.every_backend
@pytest.mark.parametrize("output", range(3))
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("reference", [False, True])
def test_gradcheck(output, temperature, reference):
    op = token_logprob_ref if reference else token_logprob
    p = problem(4, 5, 7, torch.float64, bias=True).leaves()
    rows = torch.tensor([2, 0, 2, 5], dtype=torch.int32)

    def function(hidden, weight, bias):
        return op(
            hidden, weight, p.targets, rows=rows, bias=bias, temperature=temperature, forbid_ids=[8]
        )[output]

    p.weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    p.bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (p.hidden, p.weight, p.bias))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    # With one column all rows of the head are 1 or -1: a gradient then cancels down to the rounding
    # of its coefficients.
    d=st.integers(2, 90),
    v=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
    options=st.sampled_from([{}, {"temperature": 0.5}, {"temperature": 3.0}]),
)
def test_error_is_no_worse_than_naive(n, d, v, dtype, seed, options):
    """Naive: logits and softmax in the inputs' own type."""
    p = problem(n, d, v, dtype, seed=seed)
    truth, true_gradients = run(p.exact(), reference=True, **options)
    ours, gradients = run(p, **options)
    q = p.leaves()
    logits_NV = (q.hidden[q.rows.long()] @ q.weight.t()) / options.get("temperature", 1.0)
    logprob_NV = logits_NV.log_softmax(-1)
    naive = [
        logprob_NV.gather(1, q.targets[:, None])[:, 0],
        torch.logsumexp(logits_NV, -1),
        -(logprob_NV.exp() * logprob_NV).sum(-1),
    ]
    sum((x * c.to(x.dtype)).sum() for x, c in zip(naive, cotangents(n), strict=True)).backward()
    for value, exact, other in zip(ours, truth, naive, strict=True):
        error, naive_error = (value - exact).abs(), (other.detach() - exact).abs()
        assert n == 0 or (error <= 2 * naive_error.max() + 1e-5).all()
    for value, exact, other in zip(
        gradients, true_gradients, (q.hidden.grad, q.weight.grad), strict=True
    ):
        slack = gradient_tolerance(value, dtype)
        assert relative_error(value, exact) <= 2 * relative_error(other, exact) + slack


@pytest.mark.every_backend
@pytest.mark.parametrize("v", [5, 97, 507, 512, 517, 2017])
@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_vocabulary_tails_are_invariant_to_a_shift(v, shift):
    """A padded column that counted as logit 0 would show here."""
    p = problem(21, 33, v, bias=True)
    ours, gradients = run(p)
    p.bias = p.bias + shift
    moved, moved_gradients = run(p)
    assert torch.allclose(moved[0], ours[0], atol=2e-5)
    assert torch.allclose(moved[1], ours[1] + shift, atol=2e-5)
    assert torch.allclose(moved[2], ours[2], atol=2e-5)
    for ours_gradient, moved_gradient in zip(gradients, moved_gradients, strict=True):
        assert relative_error(moved_gradient, ours_gradient) < 2e-5


def one_logit_rows(logits_NV):
    """Inputs whose logits are the given ones: the identity as a head."""
    v = logits_NV.shape[1]
    return logits_NV, torch.eye(v), torch.zeros(len(logits_NV), dtype=torch.int64)


@pytest.mark.parametrize("level", BACKENDS)
def test_extreme_rows(level):
    v = 37
    rows = torch.zeros(6, v)
    rows[0, 0] = 20.0  # peaked on the target
    rows[2, 5] = 1e4
    rows[3, 0], rows[3, 1:] = -1e4, 1e4
    rows[4] = -1e4
    rows[5, 3], rows[5, 9] = 7.0, 7.0
    with simd_level(level):
        hidden, weight, targets = one_logit_rows(rows)
        hidden.requires_grad_()
        result = token_logprob(hidden, weight, targets)
        truth = token_logprob_ref(hidden.detach().double(), weight.double(), targets)
        assert torch.allclose(result.logprob.double(), truth.logprob, rtol=1e-6, atol=2e-7)
        assert torch.allclose(result.lse.double(), truth.lse, rtol=1e-6)
        assert torch.allclose(result.entropy.double(), truth.entropy, rtol=2e-6, atol=1e-6)
        assert result.entropy[1].item() == pytest.approx(math.log(v), abs=1e-6)
        sum(x.sum() for x in result).backward()
        exact = hidden.detach().double().requires_grad_()
        sum(x.sum() for x in token_logprob_ref(exact, weight.double(), targets)).backward()
        assert torch.allclose(hidden.grad.double(), exact.grad, atol=2e-6)


@pytest.mark.every_backend
def test_minus_infinite_bias():
    p = problem(9, 16, 40, bias=True)
    p.bias[torch.arange(40) % 3 == 0] = -math.inf
    p.targets = torch.full((9,), 7)
    assert_close(p)
    forbidden = [v for v in range(40) if v % 3 == 0]
    finite = torch.where(p.bias == -math.inf, 0.0, p.bias)
    same = token_logprob(*p.head, rows=p.rows, bias=finite, forbid_ids=forbidden)
    ours = token_logprob(*p.head, rows=p.rows, bias=p.bias)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    nothing = token_logprob(*p.head, rows=p.rows, bias=torch.full((40,), -math.inf))
    assert (nothing.lse == -math.inf).all() and nothing.logprob.isnan().all()


@pytest.mark.parametrize("level", BACKENDS)
def test_a_nan_row_poisons_only_itself(level):
    with simd_level(level):
        p = problem(40, 20, 300).leaves()
        clean = token_logprob(*p.head, rows=p.rows)
        with torch.no_grad():
            p.hidden[p.rows[4].long(), 3] = math.nan
            p.hidden[p.rows[30].long(), 0] = math.inf
        result = token_logprob(*p.head, rows=p.rows)
        bad = torch.zeros(40, dtype=torch.bool)
        bad[[4, 30]] = True
        for value, expected in zip(result, clean, strict=True):
            assert value[bad].isnan().all()
            assert torch.equal(value[~bad], expected[~bad])
        # Without a cotangent the bad rows stay out of the head's gradient too.
        (result.logprob * (~bad)).sum().backward()
        assert p.weight.grad.isfinite().all() and p.hidden.grad.isfinite().all()
        p.hidden.grad = None
        token_logprob(*p.head, rows=p.rows).logprob.sum().backward()
        bad_rows = p.hidden.grad.isnan().any(1).nonzero()[:, 0].tolist()
        assert bad_rows == sorted(int(r) for r in p.rows[[4, 30]])


@pytest.mark.every_backend
def test_selections_are_bitwise_equal():
    """All rows with ignored targets, an index list, gathered rows: the same bits."""
    p = problem(90, 50, 400, spare=60)
    rows, _ = p.rows.sort()
    labels = torch.full((150,), -100)
    labels[rows.long()] = p.targets
    grads = []
    for hidden, targets, chosen in [
        (p.hidden, p.targets, rows),
        (p.hidden, labels, None),
        (p.hidden[rows.long()], p.targets, None),
    ]:
        hidden = hidden.clone().requires_grad_()
        weight = p.weight.clone().requires_grad_()
        result = token_logprob(hidden, weight, targets, rows=chosen)
        kept = targets != -100
        (result.logprob[kept] * cotangents(90)[0].float()).sum().backward()
        assert all((x[~kept] == 0).all() for x in result)
        full = len(hidden) == 150
        unselected = torch.ones(len(hidden), dtype=torch.bool)
        unselected[rows.long() if full else slice(None)] = False
        assert (hidden.grad[unselected] == 0).all()
        selected = hidden.grad[rows.long()] if full else hidden.grad
        grads.append([*(x[kept].detach() for x in result), selected, weight.grad])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.every_backend
def test_unselected_rows_are_never_read():
    p = problem(20, 30, 100, spare=20)
    expected, gradients = run(p)
    unselected = torch.ones(40, dtype=torch.bool)
    unselected[p.rows.long()] = False
    p.hidden[unselected] = math.nan
    ours, our_gradients = run(p)
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, our_gradients, strict=True))
    assert (our_gradients[0][unselected] == 0).all()


@pytest.mark.every_backend
@pytest.mark.parametrize("chosen", [[], [0], [39], [0, 39], [5, 5, 5, 2]])
def test_small_selections_and_repeats(chosen):
    p = problem(40, 30, 100, spare=0)
    p.rows = torch.tensor(chosen, dtype=torch.int32)
    p.targets = torch.arange(len(chosen)) * 7
    assert_close(p)


@pytest.mark.every_backend
def test_strided_inputs():
    p = problem(30, 24, 60, spare=0)
    expected, gradients = run(p)
    wide = torch.randn(90, 48)
    wide[::3, 10:34] = p.hidden
    strided = wide[::3, 10:34]
    for hidden, weight in [
        (strided, p.weight),
        (p.hidden.t().contiguous().t(), p.weight.t().contiguous().t()),
        (p.hidden, p.weight.repeat(1, 2)[:, 24:]),
    ]:
        result = token_logprob(hidden, weight, p.targets, rows=p.rows)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    leaf = wide.requires_grad_()
    result = token_logprob(leaf[::3, 10:34], p.weight, p.targets, rows=p.rows)
    sum((x * c.float()).sum() for x, c in zip(result, cotangents(30), strict=True)).backward()
    assert torch.equal(leaf.grad[::3, 10:34], gradients[0])
    assert float(leaf.grad.abs().sum()) == pytest.approx(float(gradients[0].abs().sum()), rel=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("v", [100, 4099])
def test_a_row_does_not_depend_on_the_batch(level, v):
    p = problem(290, 35, v, spare=0, bias=True)
    with simd_level(level):
        whole = token_logprob(*p.head, rows=p.rows, bias=p.bias)
        shuffled = torch.randperm(290, generator=torch.Generator().manual_seed(3))
        for part in [[0], [289], [5, 100], list(range(17)), shuffled.tolist()]:
            alone = token_logprob(
                p.hidden, p.weight, p.targets[part], rows=p.rows[part], bias=p.bias
            )
            assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [64, 519, 1030])
def test_a_row_does_not_depend_on_how_many_there_are(level, dtype, width):
    """One row to eight are multiplied straight from the head, more from a packed copy."""
    p = problem(70, width, 521, dtype, spare=0, bias=True)
    with simd_level(level):
        whole = token_logprob(*p.head, rows=p.rows, bias=p.bias)
        for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33):
            part = token_logprob(p.hidden, p.weight, p.targets[:n], rows=p.rows[:n], bias=p.bias)
            assert all(torch.equal(a, b[:n]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_many_parts_of_the_head(n, dtype):
    """Several blocks of columns and chunks of the vocabulary, few rows and many."""
    assert_close(problem(n, 600, 2300, dtype, bias=True), temperature=0.9)


@pytest.mark.parametrize("shape", [(300, 300, 520), (40, 600, 2300)], ids=str)
def test_runs_and_threads_are_bitwise_equal(shape):
    p = problem(*shape, bias=True)
    results = []
    for count in (1, 1, 2, 5):
        with threads(count):
            values, gradients = run(p)
            results.append(values + gradients)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.every_backend
def test_each_output_alone_has_the_right_gradient():
    p = problem(20, 16, 50)
    for output in range(3):
        gradients = []
        for q, op in ((p.leaves(), token_logprob), (p.exact().leaves(), token_logprob_ref)):
            op(*q.head, rows=q.rows)[output].sum().backward()
            gradients.append((q.hidden.grad, q.weight.grad))
        for ours, exact in zip(*gradients, strict=True):
            assert relative_error(ours, exact) < 5e-6


@pytest.mark.every_backend
def test_only_what_is_asked_for_is_differentiated():
    p = problem(10, 8, 20, bias=True).leaves()
    p.weight.requires_grad_(False)
    token_logprob(*p.head, rows=p.rows, bias=p.bias).logprob.sum().backward()
    assert p.weight.grad is None and p.hidden.grad is not None and p.bias.grad is not None
    with torch.no_grad():
        assert not token_logprob(*p.head, rows=p.rows).logprob.requires_grad
    result = token_logprob(p.hidden.detach(), p.weight, p.targets, rows=p.rows)
    assert not result.logprob.requires_grad


@pytest.mark.parametrize(
    ("options", "logprob"),
    [
        ({}, [-0.440190, -1.440190, -2.440190, -3.440190]),
        ({"temperature": 0.5}, [-0.145078, -2.145078, -4.145078, -6.145078]),
        ({"forbid_ids": [3]}, [-0.407606, -1.407606, -2.407606]),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", [token_logprob, token_logprob_ref])
def test_published_numbers(op, options, logprob):
    """Oracle T13: logits 2, 1, 0, -1 of one row, and every target that may be one."""
    hidden = torch.ones(len(logprob), 1)
    weight = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    found = op(hidden, weight, torch.arange(len(logprob)), **options)
    assert found.logprob.tolist() == pytest.approx(logprob, abs=1e-6)
    if not options:
        assert found.entropy.tolist() == pytest.approx([0.947537] * 4, abs=1e-6)
