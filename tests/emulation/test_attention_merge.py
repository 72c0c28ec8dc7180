"""The kernel that merges attention states, emulated: equal to the CPU backend and to the twin."""

from __future__ import annotations

import pytest
import torch

from dlm_fast import _C
from dlm_fast.ops import merge_attention_states, merge_attention_states_ref


def random_states(counts, heads, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = sum(counts)
    o = torch.randn(states, heads, width, generator=generator).to(dtype)
    lse = torch.randn(states, heads, generator=generator) * 4
    is_empty = torch.rand(states, heads, generator=generator) < 0.3
    lse[is_empty] = -torch.inf
    o[is_empty] = torch.nan
    indptr = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return o, lse, indptr


def check(run, dtype, tolerance):
    for counts, heads, width in (
        ([3, 0, 1, 9], 5, 40),
        ([2, 2], 4, 64),
        ([64], 9, 33),
        ([1, 0, 0], 1, 7),
    ):
        o, lse, indptr = random_states(counts, heads, width, dtype)
        found = run(merge_attention_states, o, lse, indptr)
        truth = merge_attention_states_ref(o.double(), lse.double(), indptr)
        assert found.out.dtype == dtype
        torch.testing.assert_close(found.out.double(), truth.out, rtol=0, atol=tolerance)
        torch.testing.assert_close(found.lse.double(), truth.lse, rtol=1e-6, atol=1e-6)


@pytest.mark.covers("attention_merge_f32")
def test_float32(run):
    check(run, torch.float32, 1e-6)


@pytest.mark.covers("attention_merge_bf16")
def test_bfloat16(run):
    check(run, torch.bfloat16, 1.6e-2)


@pytest.mark.covers("attention_merge_f16")
def test_float16(run):
    check(run, torch.float16, 2e-3)


def test_equal_numbers_of_states_and_no_rows(run):
    o, lse, _ = random_states([12], 2, 8)
    o, lse = o.nan_to_num().view(4, 3, 2, 8), lse.view(4, 3, 2)
    found, truth = run(merge_attention_states, o, lse), merge_attention_states(o, lse)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    assert run(merge_attention_states, o[:0], lse[:0]).out.shape == (0, 2, 8)


def test_nan_and_far_numbers(run):
    lse = torch.tensor([[[-1e4], [1e4], [0.0], [1e4]], [[0.0], [torch.nan], [1.0], [0.0]]])
    o = torch.tensor([5.0, 1.0, 7.0, 3.0]).view(1, 4, 1, 1).expand(2, 4, 1, 1)
    out, merged = run(merge_attention_states, o, lse)
    assert out[0].item() == 2.0 and merged[0].item() == pytest.approx(1e4 + 0.6931472)
    assert bool(out[1].isnan()) and bool(merged[1].isnan())


def test_gradients(run):
    """The backward pass is torch's own operations on the same device."""
    o, lse, indptr = random_states([3, 0, 4], 2, 5)
    o = o.nan_to_num()
    found = []
    for call in (lambda *x: run(merge_attention_states, *x), merge_attention_states):
        leaves = [o.clone().requires_grad_(), lse.clone().requires_grad_()]
        state = call(*leaves, indptr)
        found.append(torch.autograd.grad(state.out.square().sum(), leaves))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_plans():
    ends = (8, 8, 8), (8, 8)
    assert _C.plan_attention_merge((7, 9, 64), 1, *ends)[:5] == (
        *("attention_merge_bf16", (7, 3), 128, 1),
        0,
    )
    for sizes, dtype, words in [
        ((0, 1, 1), 0, "nothing to merge"),
        ((1, 0, 1), 0, "nothing to merge"),
        ((2**31, 1, 1), 0, "too many rows"),
        ((1, 2**31, 1), 0, "too many heads"),
        ((1, 1, 1), 3, "float64 is left to the CPU"),
    ]:
        with pytest.raises(ValueError, match=words):
            _C.plan_attention_merge(sizes, dtype, *ends)
