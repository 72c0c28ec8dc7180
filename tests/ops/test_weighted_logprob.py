"""weighted_logprob and its raw form: the published oracle, gradients, weights, accumulation."""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import (
    BACKENDS,
    LEVELS,
    SHAPES,
    HeadProblem,
    gradient_tolerance,
    problem,
    relative_error,
    simd_level,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.ops import (
    token_logprob,
    token_logprob_ref,
    weighted_logprob,
    weighted_logprob_,
    weighted_logprob_ref,
    weighted_logprob_ref_,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def weights_of(n, seed=2):
    """Zero, negative, from 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (6 * torch.rand(n, generator=generator) - 3)
    weights = sizes * torch.randn(n, generator=generator).sign()
    weights[torch.rand(n, generator=generator) < 0.1] = 0
    return weights


def run(op, p, row_weight, upstream=1.0, **options):
    p = p.leaves()
    result = op(*p.head, row_weight, rows=p.rows, bias=p.bias, **options)
    (result.objective * upstream).backward()
    assert not result.logprob.requires_grad
    gradients = [x.grad for x in (p.hidden, p.weight, p.bias) if x is not None]
    return result.objective.detach(), result.logprob, gradients


def assert_close(p, **options):
    row_weight = weights_of(len(p.targets))
    objective, logprob, gradients = run(weighted_logprob, p, row_weight, **options)
    exact, exact_logprob, exact_gradients = run(
        weighted_logprob_ref, p.exact(), row_weight.double(), **options
    )
    assert objective.dtype == logprob.dtype == torch.float32 and objective.shape == ()
    size = float((row_weight.double().abs() * (1 + exact_logprob.abs())).sum())
    assert float((objective - exact).abs()) <= 5e-6 * size
    if len(p.targets):
        assert float((logprob - exact_logprob).abs().max()) < 1e-4
    # Where one row has nearly all the weight, the rounding of its two largest logits to float32 is
    # the error; torch's own operations show its size, up to luck.
    twins = run(weighted_logprob_ref, p, row_weight, **options)[2]
    for gradient, truth, twin in zip(gradients, exact_gradients, twins, strict=True):
        tolerance = gradient_tolerance(gradient, p.weight.dtype)
        assert relative_error(gradient, truth) < max(tolerance, 3 * relative_error(twin, truth))


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
        assert_close(p, temperature=0.7, forbid_ids=[3, 780], upstream=-1.7)
        assert_close(problem(16, 61, 2500, dtype))


def oracle_head(dtype):
    """O8: hidden states and head as functions of their indices."""
    row, column, token = torch.arange(4.0), torch.arange(8.0), torch.arange(11.0)
    hidden = torch.sin(0.1 * (8 * row[:, None] + column).double() + 0.3)
    weight = torch.cos(0.07 * (8 * token[:, None] + column).double())
    return hidden.to(dtype), weight.to(dtype), torch.tensor([1, 4, 7, 10])


O8_LSE = [5.305906464, 7.981376036, 6.486856512, 2.522834728]
O8_LOGPROB = [-2.243529033, -14.052180183, -9.756615742, -2.007005165]
O8_ENTROPY = [1.255191354, 0.969923366, 1.100936074, 2.267524215]
O8_HIDDEN_GRAD = [0.013645516, -0.040695806, -0.094837800, -0.148515278]
O8_HIDDEN_GRAD += [-0.201465328, -0.253428602, -0.304150582, -0.353382833]
O8_WEIGHT_GRAD = [0.377722386, 0.440042428, 0.497965712, 0.550913488]
O8_WEIGHT_GRAD += [0.598356717, 0.639821365, 0.674893128, 0.703221583]


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_oracle(dtype):
    """Two Monte-Carlo samples of two tokens: weights 2 and 4, coefficients 0.5 and -0.25."""
    close = {"rel": 1e-9, "abs": 5e-10} if dtype == torch.float64 else {"rel": 1e-5, "abs": 1e-6}
    hidden, weight, targets = oracle_head(dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    result = token_logprob(hidden, weight, targets)
    assert result.lse.tolist() == pytest.approx(O8_LSE, **close)
    assert result.logprob.tolist() == pytest.approx(O8_LOGPROB, **close)
    assert result.entropy.tolist() == pytest.approx(O8_ENTROPY, **close)
    ell = result.logprob.detach().reshape(2, 2).sum(1) * torch.tensor([2.0, 4.0], dtype=dtype)
    assert ell.tolist() == pytest.approx([-32.591418431, -47.054483626], **close)
    row_weight = torch.tensor([2.0, 2.0, 4.0, 4.0]) * torch.tensor([0.5, 0.5, -0.25, -0.25])
    objective, logprob = weighted_logprob(hidden, weight, targets, row_weight)
    assert objective.item() == pytest.approx(-4.532088309, **close)
    assert logprob.tolist() == pytest.approx(O8_LOGPROB, **close)
    objective.backward()
    assert hidden.grad[0].tolist() == pytest.approx(O8_HIDDEN_GRAD, **close)
    assert hidden.grad.norm().item() == pytest.approx(6.478076783, **close)
    assert weight.grad[1].tolist() == pytest.approx(O8_WEIGHT_GRAD, **close)
    assert weight.grad.norm().item() == pytest.approx(4.200853891, **close)
    assert float(weight.grad.sum(0).abs().max()) < (1e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.every_backend
def test_fused_head_against_a_dense_one():
    """Property 9: the same 16-bit inputs in float64, and the naive head in 16 bits beside it."""
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-3)):
        p = problem(200, 512, 3000, dtype)
        exact = p.exact()
        truth = token_logprob_ref(*exact.head, rows=p.rows).logprob
        ours = weighted_logprob(*p.head, torch.ones(200), rows=p.rows).logprob
        relative = (ours - truth).abs() / truth.abs().clamp(min=1)
        assert float(relative.max()) < limit
    naive = (p.hidden[p.rows.long()] @ p.weight.t()).float().log_softmax(-1)
    naive = naive.gather(1, p.targets[:, None])[:, 0]
    assert 10 * float((ours - truth).abs().max()) < float((naive - truth).abs().max()) < 0.1


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 50),
    d=st.integers(1, 80),
    v=st.integers(1, 300),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_equals_token_logprob(n, d, v, dtype, seed):
    """The one-pass form against forward, then backward with the same cotangents."""
    p = problem(n, d, v, dtype, seed=seed)
    row_weight = weights_of(n, seed)
    q = p.leaves()
    logprob = token_logprob(*q.head, rows=q.rows).logprob
    expected = (row_weight.to(logprob.dtype) * logprob).sum()
    expected.backward()
    objective, ours, gradients = run(weighted_logprob, p, row_weight)
    assert torch.equal(ours, logprob.detach())
    size = 1 + float((row_weight * logprob.detach()).abs().sum())
    assert float((objective - expected.detach()).abs()) < 1e-6 * size
    assert torch.equal(gradients[0], q.hidden.grad)
    assert torch.equal(gradients[1], q.weight.grad)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [3, 300, 1100])
def test_bfloat16_gradients_are_the_rounded_sums(level, n):
    """Whether the kernel rounds while it sums or afterwards; tiny and NaN sums too."""
    p = problem(n, 37, 521, torch.bfloat16, bias=True)
    row_weight = weights_of(n)
    row_weight[: n // 2] *= 1e-37
    if n == 3:
        p.hidden[p.rows[2].long(), 5] = math.nan
    with simd_level(level):
        _, _, gradients = run(weighted_logprob, p, row_weight)
        sums = torch.zeros(521, 37)
        _, _, hidden = weighted_logprob_(
            *p.head, row_weight, rows=p.rows, bias=p.bias, weight_grad=sums
        )
    assert gradients[1].dtype == torch.bfloat16
    assert torch.equal(gradients[1].nan_to_num(), sums.to(torch.bfloat16).nan_to_num())
    assert torch.equal(gradients[1].isnan(), sums.isnan())
    assert torch.equal(gradients[0].nan_to_num(), hidden.nan_to_num())


@pytest.mark.parametrize("level", BACKENDS)
def test_rows_of_weight_zero_stay_out(level):
    with simd_level(level):
        p = problem(40, 20, 300, bias=True)
        row_weight = weights_of(40)
        row_weight[[4, 30]] = 0
        expected = run(weighted_logprob, p, row_weight)
        p.hidden[p.rows[4].long()] = math.nan
        p.hidden[p.rows[30].long(), 2] = math.inf
        objective, logprob, gradients = run(weighted_logprob, p, row_weight)
        assert torch.equal(objective, expected[0])
        assert logprob.isnan().nonzero()[:, 0].tolist() == [4, 30]
        for ours, clean in zip(gradients, expected[2], strict=True):
            assert torch.equal(ours, clean)


def test_ignored_rows_stay_out():
    p = problem(40, 20, 300)
    row_weight = weights_of(40)
    kept = torch.arange(40) % 4 != 1
    expected = run(
        weighted_logprob,
        HeadProblem(p.hidden, p.weight, p.targets[kept], p.rows[kept]),
        row_weight[kept],
    )
    p.targets[~kept] = -100
    p.hidden[p.rows[~kept].long()] = math.nan
    objective, logprob, gradients = run(weighted_logprob, p, row_weight)
    assert torch.equal(objective, expected[0]) and torch.equal(logprob[kept], expected[1])
    assert (logprob[~kept] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[2], strict=True))


@pytest.mark.every_backend
def test_a_nan_row_shows():
    p = problem(10, 20, 30)
    p.hidden[p.rows[3].long(), 0] = math.nan
    objective, _, gradients = run(weighted_logprob, p, torch.ones(10))
    assert objective.isnan() and gradients[1].isnan().all()
    assert gradients[0].isnan().any(1).nonzero()[:, 0].tolist() == [int(p.rows[3])]


@pytest.mark.every_backend
def test_backward_twice_and_upstream_scale():
    p = problem(10, 20, 30).leaves()
    objective = weighted_logprob(*p.head, weights_of(10), rows=p.rows).objective
    (first,) = torch.autograd.grad(3 * objective, p.weight, retain_graph=True)
    (second,) = torch.autograd.grad(objective, p.weight)
    assert torch.equal(first, 3 * second)


@pytest.mark.every_backend
def test_only_what_is_asked_for_is_computed():
    p = problem(10, 20, 30).leaves()
    with torch.no_grad():
        assert not weighted_logprob(*p.head, torch.ones(10), rows=p.rows).objective.requires_grad
    p.weight.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        objective = weighted_logprob(*p.head, torch.ones(10), rows=p.rows).objective
    assert p.weight.shape not in saved
    objective.backward()
    assert p.weight.grad is None and p.hidden.grad is not None


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("level", BACKENDS)
def test_raw_form_adds_in_place(level, dtype):
    p = problem(60, 75, 517, dtype, bias=True)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(517, 75, generator=generator).to(out)
    start_bias = torch.randn(517, generator=generator).to(out)
    row_weight = weights_of(60).to(out)
    buffers = [(start.clone(), start_bias.clone()) for _ in range(2)]
    options = {"rows": p.rows, "temperature": 1.4, "alpha": -0.5}
    with simd_level(level):
        ours = weighted_logprob_(
            *p.leaves().head,
            row_weight,
            bias=p.bias,
            weight_grad=buffers[0][0],
            bias_grad=buffers[0][1],
            **options,
        )
    exact = [b.double() for b in buffers[1]]
    truth = weighted_logprob_ref_(
        *p.exact().head,
        row_weight.double(),
        bias=p.bias.double(),
        weight_grad=exact[0],
        bias_grad=exact[1],
        **options,
    )
    assert not any(x.requires_grad for x in ours)
    assert ours[2].dtype == dtype and ours[2].shape == p.hidden.shape
    assert relative_error(ours[1], truth[1]) < 1e-6
    assert relative_error(ours[2], truth[2]) < gradient_tolerance(ours[2], dtype)
    halves = (torch.bfloat16, torch.float16)
    rounds = (dtype == torch.bfloat16 and level == 3) or (dtype in halves and level == "emulated")
    for buffer, expected in zip(buffers[0], exact, strict=True):
        limit = 3e-3 if rounds else 5e-6
        assert relative_error(buffer, expected) < limit


def test_micro_steps_equal_one_call():
    """Eight micro-steps into one buffer, a concatenated call, and the functional form."""
    p = problem(640, 64, 517, spare=0)
    row_weight = weights_of(640)
    whole = torch.zeros(517, 64)
    hidden_grad = weighted_logprob_(*p.head, row_weight, rows=p.rows, weight_grad=whole)[2]
    parts, hidden_parts = torch.zeros(517, 64), torch.zeros_like(p.hidden)
    for rows, targets, weights in zip(
        p.rows.chunk(8), p.targets.chunk(8), row_weight.chunk(8), strict=True
    ):
        hidden_parts += weighted_logprob_(
            p.hidden, p.weight, targets, weights, rows=rows, weight_grad=parts
        )[2]
    assert relative_error(parts, whole) < 1e-6
    assert torch.equal(hidden_parts, hidden_grad)
    gradients = run(weighted_logprob, p, row_weight)[2]
    assert torch.equal(gradients[0], hidden_grad) and torch.equal(gradients[1], whole)


def test_many_small_contributions_do_not_vanish():
    """2048 equal contributions under bfloat16 inputs: a bfloat16 sum would lose them."""
    p = problem(4, 16, 20, torch.bfloat16)
    once, many, short = torch.zeros(20, 16), torch.zeros(20, 16), torch.zeros(20, 16).bfloat16()
    weighted_logprob_(*p.head, torch.ones(4), rows=p.rows, weight_grad=once)
    for _ in range(2048):
        weighted_logprob_(*p.head, torch.ones(4), rows=p.rows, weight_grad=many)
        short += once.bfloat16()
    assert relative_error(many, 2048 * once) < 1e-4
    assert relative_error(short, 2048 * once) > 0.1


@pytest.mark.parametrize("shape", [(300, 300, 520), (40, 600, 2300)], ids=str)
def test_runs_and_threads_are_bitwise_equal(shape):
    p = problem(*shape, bias=True)
    results = []
    for count in (1, 1, 2, 5):
        with threads(count):
            objective, logprob, gradients = run(weighted_logprob, p, weights_of(shape[0]))
            results.append([objective, logprob, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.every_backend
def test_no_rows():
    p = problem(0, 5, 7, bias=True)
    objective, logprob, gradients = run(weighted_logprob, p, torch.zeros(0))
    assert objective == 0 and logprob.shape == (0,)
    assert all((g == 0).all() for g in gradients)
    buffer = torch.full((7, 5), 2.0)
    weighted_logprob_(*p.head, torch.zeros(0), rows=p.rows, weight_grad=buffer)
    assert (buffer == 2).all()
