"""The kernels that add one sample's gradients, emulated: equal to the definition."""

from __future__ import annotations

import math

import pytest
import torch
from axpy_problems import PAIRS, SIZES, check, tensors
from device_runs import on_emulator
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast import _C
from dlm_fast.ops import GradAccumulator, axpy_multi, axpy_multi_ref
from dlm_fast.ops._executor import Emulated


@pytest.mark.covers("axpy_square", "axpy_add", "axpy_total")
@pytest.mark.parametrize(("main_dtype", "grad_dtype"), PAIRS, ids=str)
def test_equals_the_definition(run, main_dtype, grad_dtype):
    mains, grads = tensors(SIZES, main_dtype, grad_dtype)
    options = {"max_norm": 100.0, "keys": range(7, 7 + len(SIZES)), "step": 3}
    assert check(run, mains, grads, -0.7, **options)[2] < 0.5


def test_rounding_has_the_same_random_bits(run):
    """With a scale of 1 nothing else rounds: bit for bit the definition's."""
    mains, grads = tensors((100, 16390), torch.bfloat16, torch.bfloat16)
    expected = [main.clone() for main in mains]
    run(axpy_multi, mains, grads, keys=[1 << 50, 5], step=9)
    axpy_multi_ref(expected, grads, keys=[1 << 50, 5], step=9)
    assert all(torch.equal(a, b) for a, b in zip(mains, expected, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    pair=st.sampled_from(PAIRS),
    max_norm=st.sampled_from([math.inf, 2.0]),
    order=st.sampled_from(Emulated.ORDERS),
    seed=st.integers(0, 2**16),
)
def test_random_lists(sizes, pair, max_norm, order, seed):
    check(
        on_emulator(order, seed), *tensors(sizes, *pair, seed), 0.3, max_norm=max_norm, keys=sizes
    )


def test_more_tensors_than_a_launch_takes(run):
    """Five bundles, more chunks than a block has threads; views that do not lie on a border of 16
    bytes."""
    storage = torch.randn(2, 300 * 13 + 1, generator=torch.Generator().manual_seed(1))
    mains = list(storage[0, 1:].split(13))
    grads = [part.bfloat16() for part in storage[1, 1:].split(13)]
    check(run, mains, grads, 2.0, max_norm=1.0, square_elsewhere=5.0)


def test_a_norm_at_the_limit_is_not_scaled(run):
    """Nor does a limit whose square is no longer above zero make a number of nothing."""
    mains = [torch.ones(3)]
    result = run(axpy_multi, mains, [torch.zeros(3)], max_norm=1e-200)
    assert result.tolist() == [0.0, 0.0, 1.0] and mains[0].eq(1).all()
    result = run(axpy_multi, mains, [torch.tensor([3.0, 4.0, 0.0])], max_norm=5.0)
    assert result[2] == 1.0


def test_infinity_and_nan_stay_visible(run):
    mains = [torch.zeros(3), torch.zeros(2)]
    result = run(axpy_multi, mains, [torch.tensor([1, math.nan, 2]), torch.ones(2)], max_norm=1.0)
    assert result.isnan().tolist() == [True, True, True] and mains[1].isnan().all()
    main = torch.zeros(3, dtype=torch.bfloat16)
    run(axpy_multi, [main], [torch.tensor([math.inf, -math.inf, math.nan])], keys=[3])
    assert main[0] == math.inf and main[1] == -math.inf and main[2].isnan()


def test_accumulator(run):
    """The whole class on the path of a GPU."""
    params = [torch.zeros(5, 7, requires_grad=True), torch.zeros(40, requires_grad=True)]

    def work():
        accumulator = GradAccumulator(params, per_sample_clip=7.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            accumulator.add(0.5)
        return accumulator.main_grads, accumulator.statistics()

    (mains, found), (expected, truth) = run(work), work()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mains, expected, strict=True))
    assert torch.allclose(found.norms, truth.norms) and found.clip_fraction == truth.clip_fraction
    assert found.variance == pytest.approx(truth.variance, rel=1e-5)


def test_plans():
    tensor = (64, 64, 16385, 0, 1, 7)
    plans = _C.plan_axpy_multi([tensor] * 70, 1.0, 2.0, 0.0, 3, 8, 8)
    names = [plan[0] for plan in plans]
    assert names == ["axpy_square"] * 2 + ["axpy_total"] + ["axpy_add"] * 2 + ["axpy_total"]
    assert [plan[1] for plan in plans] == [(128, 1), (12, 1), (2, 1)] * 2
    assert _C.axpy_chunks([tensor] * 70) == 140
    without = _C.plan_axpy_multi([tensor], 1.0, math.inf, 0.0, 3, 8, 8)
    assert [plan[0] for plan in without] == ["axpy_add", "axpy_total"]
    for wrong, match in (
        ((64, 64, 5, 2, 1, 7), "must be float64, float32 or bfloat16"),
        ((64, 64, 5, 3, 1, 7), "float64 gradients need"),
        ((0, 64, 5, 0, 1, 7), "a tensor is missing"),
    ):
        with pytest.raises(ValueError, match=match):
            _C.plan_axpy_multi([wrong], 1.0, 2.0, 0.0, 3, 8, 8)
