"""Norms of samples' weight gradients, of linear layers and of the head, against the gradients."""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import LEVELS, problem, simd_level, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dlm_fast.ops import (
    head_sample_grad_norm,
    head_sample_grad_norm_ref,
    sample_grad_norm,
    sample_grad_norm_ref,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pair(n, d_out, d_in, grad_dtype=torch.float32, input_dtype=None, seed=0):
    """On torch's default device."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(n, d_out, generator=generator, device="cpu").to(grad_dtype)
    x = torch.randn(n, d_in, generator=generator, device="cpu").to(input_dtype or grad_dtype)
    return grad.to(torch.get_default_device()), x.to(torch.get_default_device())


def assert_close(ours, truth):
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, truth, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", ["gram", "direct"])
def test_both_forms_on_every_instruction_set(method, dtype, level):
    grad, x = pair(700, 300, 270, dtype)
    starts = [0, 1, 1, 130, 258, 700]
    with simd_level(level):
        ours = sample_grad_norm(grad, x, starts, method=method)
    assert_close(ours, sample_grad_norm_ref(grad, x, starts))
    assert ours[1] == 0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), max_size=4),
    d_out=st.integers(1, 280),
    d_in=st.integers(1, 280),
    dtypes=st.sampled_from([(torch.float32, torch.bfloat16), (torch.float16, torch.float32)]),
    method=st.sampled_from(["auto", "gram", "direct"]),
    seed=st.integers(0, 1000),
)
def test_random_shapes(lengths, d_out, d_in, dtypes, method, seed):
    starts = torch.tensor([2, *lengths]).cumsum(0)
    grad, x = pair(int(starts[-1]) + 3, d_out, d_in, *dtypes, seed)
    assert_close(
        sample_grad_norm(grad, x, starts, method=method), sample_grad_norm_ref(grad, x, starts)
    )


@pytest.mark.every_backend
@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,) * 2,
        (torch.bfloat16,) * 2,
        (torch.float64,) * 2,
        (torch.float16, torch.float32),
    ],
)
def test_many_tiles(method, dtypes, monkeypatch):
    """Ragged last tiles; a sample of one row, one of none."""
    monkeypatch.setattr("dlm_fast.ops._cuda_norms.TILE_ROWS", 32)
    monkeypatch.setattr("dlm_fast.ops._cuda_norms.TILE_BYTES", 1 << 12)
    grad, x = pair(150, 45, 70, *dtypes)
    starts = [1, 70, 71, 71, 149]
    ours = sample_grad_norm(grad, x, starts, method=method)
    assert_close(ours, sample_grad_norm_ref(grad, x, starts))
    assert ours[2] == 0 and torch.equal(ours, sample_grad_norm(grad, x, starts, method=method))


@pytest.mark.every_backend
def test_explicit_gradients_of_a_linear_layer():
    torch.manual_seed(0)
    layer = nn.Linear(40, 60)
    x = torch.randn(6, 25, 40)
    out = layer(x)
    (grad_output,) = torch.autograd.grad(out.tanh().square().sum(), out)
    squares = []
    for k in range(6):
        layer.zero_grad()
        layer(x[k]).tanh().square().sum().backward()
        squares.append(layer.weight.grad.square().sum().double())
    starts = range(0, 151, 25)
    ours = sample_grad_norm(grad_output.flatten(0, 1), x.flatten(0, 1), list(starts))
    assert torch.allclose(ours, torch.stack(squares), rtol=1e-5)


def test_the_cheaper_form_is_taken():
    """Both forms differ in their last bits, which shows the choice: T < Din Dout / (Din + Dout)."""
    for rows, expected in ((59, "gram"), (61, "direct")):
        grad, x = pair(rows, 120, 120)
        forms = {m: sample_grad_norm(grad, x, [0, rows], method=m) for m in ("gram", "direct")}
        assert not torch.equal(forms["gram"], forms["direct"])
        assert torch.equal(sample_grad_norm(grad, x, [0, rows]), forms[expected])


@pytest.mark.parametrize("method", ["gram", "direct"])
def test_threads_give_the_same_bits(method):
    grad, x = pair(900, 600, 300)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(sample_grad_norm(grad, x, [0, 300, 900], method=method))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.every_backend
def test_strides_and_no_rows():
    grad, x = pair(50, 30, 20)
    truth = sample_grad_norm_ref(grad, x, [0, 50])
    wide = torch.full((50, 64), math.nan)
    wide[:, :30] = grad
    assert_close(sample_grad_norm(wide[:, :30], x.t().contiguous().t(), [0, 50]), truth)
    assert sample_grad_norm(grad, x, [0]).shape == (0,)
    assert sample_grad_norm(grad[:0], x[:0], [0, 0, 0]).tolist() == [0, 0]
    assert sample_grad_norm(grad[:, :0], x, [0, 50]).tolist() == [0]


@pytest.mark.every_backend
def test_nan_stays_in_its_sample():
    grad, x = pair(50, 30, 20)
    grad[30, 3] = math.nan
    for method in ("gram", "direct"):
        found = sample_grad_norm(grad, x, [0, 20, 40, 50], method=method)
        assert found.isnan().tolist() == [False, True, False]


def test_wrong_arguments():
    grad, x = pair(10, 4, 5)
    cases = [
        (TypeError, "grad_output must be", (grad.long(), x, [0, 10]), {}),
        (TypeError, "float64 goes", (grad.double(), x, [0, 10]), {}),
        (ValueError, "must have shape", (grad[None], x, [0, 10]), {}),
        (ValueError, "10 rows but input has 9", (grad, x[:9], [0, 10]), {}),
        (ValueError, "must not fall", (grad, x, [0, 5, 4]), {}),
        (ValueError, "from 0 to 11", (grad, x, [0, 11]), {}),
        (ValueError, "from -1", (grad, x, [-1, 10]), {}),
        (ValueError, r"\[K\+1\]", (grad, x, []), {}),
        (TypeError, "starts must be", (grad, x, torch.tensor([0.0, 10.0])), {}),
        (ValueError, "one of", (grad, x, [0, 10]), {"method": "best"}),
    ]
    for error, words, args, options in cases:
        with pytest.raises(error, match=words):
            sample_grad_norm(*args, **options)


def test_opcheck():
    grad, x = pair(10, 4, 5)
    torch.library.opcheck(
        torch.ops.dlm_fast.sample_grad_norm.default, (grad, x, torch.tensor([0, 4, 10]), 0)
    )


def head_weights(n):
    numbers = torch.randn(n, generator=torch.Generator().manual_seed(3), device="cpu")
    return numbers.to(torch.get_default_device())


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(60, 40, 150), (70, 16, 5000)], ids=str)
def test_head(shape, dtype):
    """Gram with 40 columns, direct with 16; a panel of the vocabulary and several."""
    p = problem(*shape, dtype, bias=True)
    p.targets[p.targets == 3] = 4
    p.targets[5] = -100
    row_weight = head_weights(shape[0])
    row_weight[7] = 0
    options = {"rows": p.rows, "bias": p.bias, "temperature": 0.7, "forbid_ids": [3, 149]}
    starts = [0, 20, 20, 45, shape[0]]
    p.targets[p.targets == 149] = 4
    truth = head_sample_grad_norm_ref(*p.head, row_weight, starts, **options)
    ours = head_sample_grad_norm(*p.head, row_weight, starts, **options)
    assert torch.allclose(ours, truth, rtol=1e-3) and ours[1] == 0


@pytest.mark.every_backend
def test_inactive_rows_of_a_head_may_hold_anything():
    p = problem(40, 50, 100)
    row_weight = head_weights(40)
    row_weight[3], p.targets[9] = 0, -100
    expected = head_sample_grad_norm(*p.head, row_weight, [0, 20, 40], rows=p.rows)
    p.hidden[p.rows[3].long()], p.hidden[p.rows[9].long()] = math.nan, math.inf
    found = head_sample_grad_norm(*p.head, row_weight, [0, 20, 40], rows=p.rows)
    assert torch.equal(found, expected)


@pytest.mark.every_backend
def test_head_norm_needs_no_rows():
    p = problem(0, 5, 7)
    assert head_sample_grad_norm(*p.head, torch.zeros(0), [0, 0], rows=p.rows).tolist() == [0]
    with pytest.raises(ValueError, match="must not fall"):
        head_sample_grad_norm(*p.head, torch.zeros(0), [0, -1], rows=p.rows)
