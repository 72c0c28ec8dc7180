"""axpy_multi: sum, norm, inner product and clip factor against float64; rounding without bias."""

from __future__ import annotations

import math

import pytest
import torch
from axpy_problems import PAIRS, SIZES, tensors
from head_problems import LEVELS, simd_level, threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.ops import axpy_multi, axpy_multi_ref


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("main_dtype, grad_dtype", PAIRS, ids=str)
def test_equals_the_definition(main_dtype, grad_dtype, level):
    mains, grads = tensors(SIZES, main_dtype, grad_dtype)
    expected = [main.clone() for main in mains]
    options = {"max_norm": 100.0, "keys": range(7, 7 + len(SIZES)), "step": 3}
    with simd_level(level):
        result = axpy_multi(mains, grads, -0.7, **options)
    exact = axpy_multi_ref(expected, grads, -0.7, **options)
    assert torch.allclose(result, exact, rtol=1e-12, atol=1e-9) and result[2] < 0.5
    for ours, truth in zip(mains, expected, strict=True):
        if main_dtype == torch.float64:
            assert torch.allclose(ours, truth, rtol=1e-13, atol=1e-14)
        else:  # one multiplication and one addition, each rounded: the same bits
            assert torch.equal(ours, truth)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(grad_dtype):
    mains, grads = tensors(SIZES, torch.float32, grad_dtype)
    exact = [m.double() + 0.3 * g.double() for m, g in zip(mains, grads, strict=True)]
    inner = sum(float((m.double() * g.double()).sum()) for m, g in zip(mains, grads, strict=True))
    square = sum(float(g.double().square().sum()) for g in grads)
    result = axpy_multi(mains, grads, 0.3)
    assert result.tolist() == pytest.approx([square, inner, 1.0], rel=1e-12)
    for ours, truth in zip(mains, exact, strict=True):
        assert bool(((ours - truth).abs() <= 2e-7 * (1 + truth.abs())).all())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), max_size=4),
    pair=st.sampled_from(PAIRS),
    scale=st.floats(-3, 3),
    max_norm=st.sampled_from([math.inf, 5.0, 0.01]),
    elsewhere=st.sampled_from([0.0, 40.0]),
    seed=st.integers(0, 1000),
)
def test_random_lists(sizes, pair, scale, max_norm, elsewhere, seed):
    mains, grads = tensors(sizes, *pair, seed)
    expected = [main.clone() for main in mains]
    options = {"max_norm": max_norm, "square_elsewhere": elsewhere, "keys": sizes, "step": seed}
    result = axpy_multi(mains, grads, scale, **options)
    exact = axpy_multi_ref(expected, grads, scale, **options)
    assert torch.allclose(result, exact, rtol=1e-12, atol=1e-12)
    for ours, truth in zip(mains, expected, strict=True):
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[pair[0]]
        assert torch.allclose(ours, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_instruction_sets_give_the_same_bits(main_dtype):
    results = []
    for level in LEVELS:
        for count in (1, 3):
            mains, grads = tensors(SIZES, main_dtype, torch.bfloat16)
            with simd_level(level), threads(count):
                results.append([axpy_multi(mains, grads, 0.37, max_norm=20.0), *mains])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_stochastic_rounding_is_unbiased():
    """The mean of 4096 roundings of each number lies within 4.5 standard errors of it: 64 numbers
    of 4 errors each would fail now and then, so the mean over all of them is held to 4."""
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(64, generator=generator)
    draws = []
    for step in range(4096):
        main = torch.zeros(64, dtype=torch.bfloat16)
        axpy_multi([main], [exact], keys=[11], step=step)
        draws.append(main.double())
    draws = torch.stack(draws)
    unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7).double()
    assert bool(((draws - exact).abs() < unit).all())  # always one of the two neighbours
    fraction = ((exact.double() - draws.amin(0)) / unit).clamp(0, 1)
    error = unit * (fraction * (1 - fraction) / 4096).sqrt()
    bias = (draws.mean(0) - exact.double()) / error.clamp(min=1e-12)
    assert float(bias.abs().max()) < 4.5 and abs(float(bias.mean())) < 4 / math.sqrt(64)


def test_keys_steps_and_places_name_different_numbers():
    exact = torch.full((4096,), 1 + 2.0**-9)

    def rounded(key, step):
        main = torch.zeros(4096, dtype=torch.bfloat16)
        axpy_multi([main], [exact], keys=[key], step=step)
        return main > 1

    first = rounded(1, 0)
    assert torch.equal(first, rounded(1, 0)) and 0.2 < float(first.double().mean()) < 0.3
    for other in (rounded(2, 0), rounded(1, 1), rounded(1 << 40, 0), first.roll(8)):
        assert 0.3 < float((first ^ other).double().mean()) < 0.45


def test_drift_over_2048_equal_contributions():
    """bfloat16 to nearest stops growing, stochastic rounding does not, float32 is exact."""
    once = torch.full((512,), 2.0**-6 * 1.25)
    nearest, stochastic = torch.ones(512).bfloat16(), torch.ones(512).bfloat16()
    main = torch.ones(512)
    for step in range(2048):
        nearest += once
        axpy_multi([stochastic], [once], step=step)
        axpy_multi([main], [once])
    truth = 1 + 2048 * 2.0**-6 * 1.25
    assert torch.equal(main, torch.full((512,), truth))
    assert float(nearest.float().mean()) < 0.5 * truth
    assert float(stochastic.float().mean()) == pytest.approx(truth, rel=2e-3)


def test_infinities_and_nan_stay_visible():
    grads = [torch.tensor([1.0, math.inf]), torch.tensor([2.0])]
    mains = [torch.zeros(2), torch.zeros(1)]
    result = axpy_multi(mains, grads, max_norm=1.0)
    assert result[0] == math.inf and mains[0].isnan().tolist() == [False, True]
    mains = [torch.zeros(2), torch.zeros(1)]
    axpy_multi(mains, [torch.tensor([1.0, math.nan]), torch.tensor([2.0])], max_norm=1.0)
    assert mains[0].isnan().all() and mains[1].isnan().all()
    for value in (math.inf, -math.inf, math.nan):
        for step in range(20):
            main = torch.zeros(3, dtype=torch.bfloat16)
            axpy_multi([main], [torch.full((3,), value)], step=step)
            assert torch.equal(main, torch.full_like(main, value)) or main.isnan().all() == (
                value != value
            )
            assert not main.isfinite().any()


def test_layouts():
    grad = torch.randn(6, 5)
    for main in (torch.zeros(5, 6).t(), torch.zeros(6, 5)):
        for layout in (grad, grad.t().contiguous().t(), torch.randn(6, 10)[:, ::2].copy_(grad)):
            before = main.clone()
            result = axpy_multi([main], [layout])
            assert torch.equal(main, before + grad)
            assert result[1] == pytest.approx(float((before.double() * grad).sum()), abs=1e-6)
    # rounding is keyed by the place in memory, in the definition too
    main, expected = (torch.zeros(5, 6, dtype=torch.bfloat16).t() for _ in range(2))
    axpy_multi([main], [grad.t().contiguous().t()], keys=[3])
    axpy_multi_ref([expected], [grad.t().contiguous().t()], keys=[3])
    assert torch.equal(main, expected)


def test_no_tensors():
    assert axpy_multi([], []).tolist() == [0, 0, 1]
    assert axpy_multi([], [], max_norm=2.0, square_elsewhere=16.0)[2] == 0.5


def test_wrong_arguments():
    main, grad = torch.zeros(3), torch.ones(3)
    cases = [
        (ValueError, "1 main gradients but 0", ([main], []), {}),
        (
            TypeError,
            r"mains\[0\] must be float32 or bfloat16 or float64",
            ([main.half()], [grad]),
            {},
        ),
        (TypeError, r"grads\[0\] must be", ([main], [grad.long()]), {}),
        (TypeError, "float64 goes", ([main], [grad.double()]), {}),
        (TypeError, "float64 goes", ([main.double()], [grad]), {}),
        (TypeError, "sparse", ([main], [grad.to_sparse()]), {}),
        (ValueError, r"shape \(3,\).*\(2,\)", ([main], [grad[:2]]), {}),
        (ValueError, "leave gaps", ([torch.zeros(6)[::2]], [grad]), {}),
        (ValueError, "leave gaps", ([torch.zeros(1).expand(3)], [grad]), {}),
        (ValueError, "require grad", ([main.clone().requires_grad_()], [grad]), {}),
        (ValueError, "max_norm", ([main], [grad]), {"max_norm": 0.0}),
        (ValueError, "max_norm", ([main], [grad]), {"max_norm": math.nan}),
        (ValueError, "2 keys", ([main], [grad]), {"keys": [1, 2]}),
        (ValueError, "step", ([main], [grad]), {"step": -1}),
    ]
    for error, words, args, options in cases:
        with pytest.raises(error, match=words):
            axpy_multi(*args, **options)
    assert torch.equal(main, torch.zeros(3))


def test_opcheck():
    mains, grads = tensors((3, 70), torch.float32, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.dlm_fast.axpy_multi.default, (mains, grads, 0.5, 1.0, 0.0, [1, 2], 0)
    )
