"""Merged attention states equal attention over all keys at once; nothing merged is (0, -inf)."""

import math

import pytest
import torch
from attention_problems import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.ops import (
    lse_from_natural,
    lse_to_natural,
    merge_attention_states,
    merge_attention_states_ref,
)

raw = torch.ops.dlm_fast.merge_attention_states.default


def state_of(score_HK, value_HKd):
    """Attention over K keys by its definition."""
    if score_HK.shape[1] == 0:
        return value_HKd.sum(1), torch.full(score_HK.shape[:1], -torch.inf, dtype=score_HK.dtype)
    return torch.einsum("hk,hkd->hd", score_HK.softmax(-1), value_HKd), score_HK.logsumexp(-1)


def random_states(counts, heads=3, width=5, spread=1.0, dtype=torch.float64, seed=0):
    """Ragged states of rows with ``counts`` of them, some empty; and the rows' attention in one
    pass."""
    generator = torch.Generator().manual_seed(seed)
    states, whole = [], []
    for count in counts:
        sizes = [int(torch.randint(0, 4, (), generator=generator)) for _ in range(count)]
        keys = sum(sizes)
        score = torch.randn(heads, keys, generator=generator, dtype=torch.float64) * spread
        value = torch.randn(heads, keys, width, generator=generator, dtype=torch.float64)
        whole.append(state_of(score, value))
        parts = zip(score.split(sizes, 1), value.split(sizes, 1), strict=True)
        states += [state_of(s, v) for s, v in parts] if count else []
    indptr = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    o = torch.stack([s[0] for s in states]) if states else torch.zeros(0, heads, width)
    lse = torch.stack([s[1] for s in states]) if states else torch.zeros(0, heads)
    return o.to(dtype), lse.to(dtype), indptr, [torch.stack(x) for x in zip(*whole, strict=True)]


def test_two_states_of_known_numbers():
    """Scores (1, 2) and (3, 1/2) with values (1, 0), (0, 1) and (1, 1), (2, -1)."""
    a = state_of(torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    b = state_of(torch.tensor([[3.0, 0.5]]), torch.tensor([[[1.0, 1.0], [2.0, -1.0]]]))
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(a[0], torch.tensor([[0.268941, 0.731059]]), **close)
    torch.testing.assert_close(b[0], torch.tensor([[1.075858, 0.848284]]), **close)
    torch.testing.assert_close(torch.cat([a[1], b[1]]), torch.tensor([2.313262, 3.078890]), **close)
    for merge in (merge_attention_states, merge_attention_states_ref):
        out, lse = merge(torch.stack([a[0], b[0]])[None], torch.stack([a[1], b[1]])[None])
        torch.testing.assert_close(out, torch.tensor([[[0.819722, 0.811073]]]), **close)
        torch.testing.assert_close(lse, torch.tensor([[3.460773]]), **close)


@given(st.lists(st.integers(0, 6), max_size=6), st.integers(0, 1000))
def test_merging_equals_one_pass(counts, seed):
    o, lse, indptr, whole = random_states(counts, seed=seed) if counts else (
        torch.zeros(0, 3, 5), torch.zeros(0, 3), torch.zeros(1, dtype=torch.int32), []
    )  # fmt: skip
    for merge in (merge_attention_states, merge_attention_states_ref):
        found = merge(o, lse, indptr)
        assert found.out.shape == (len(counts), 3, 5) and found.lse.shape == (len(counts), 3)
        if counts:
            assert_close(found, whole)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_any_order_and_any_grouping(count):
    """Commutative and associative, to float32 rounding."""
    o, lse, _, _ = random_states([count], spread=4, dtype=torch.float32, seed=count)
    expected = merge_attention_states(o[None], lse[None])
    generator = torch.Generator().manual_seed(count)
    for _ in range(5):
        order = torch.randperm(count, generator=generator)
        cut = int(torch.randint(0, count + 1, (), generator=generator))
        halves = [merge_attention_states(o[part][None], lse[part][None])
                  for part in (order[:cut], order[cut:])]  # fmt: skip
        regrouped = merge_attention_states(
            torch.stack([h.out[0] for h in halves])[None],
            torch.stack([h.lse[0] for h in halves])[None],
        )
        shuffled = merge_attention_states(o[order][None], lse[order][None])
        for found in (shuffled, regrouped):
            torch.testing.assert_close(found.out, expected.out, rtol=0, atol=1e-6)
            torch.testing.assert_close(found.lse, expected.lse, rtol=1e-6, atol=1e-6)


def test_the_empty_state_is_neutral():
    o, lse, _, _ = random_states([3], seed=1)
    expected = merge_attention_states(o[None], lse[None])
    junk = torch.full((1, 3, 5), torch.nan, dtype=torch.float64)
    nothing = torch.full((1, 3), -torch.inf, dtype=torch.float64)
    for place in range(4):
        with_empty = [torch.cat([x[:place], e, x[place:]])[None]
                      for x, e in ((o, junk), (lse, nothing))]  # fmt: skip
        for merge in (merge_attention_states, merge_attention_states_ref):
            assert_close(merge(*with_empty), expected)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_all_empty_stays_empty(count):
    o = torch.full((2, count, 3, 4), torch.nan)
    lse = torch.full((2, count, 3), -torch.inf)
    for merge in (merge_attention_states, merge_attention_states_ref):
        out, merged = merge(o, lse)
        assert torch.equal(out, torch.zeros(2, 3, 4))
        assert torch.equal(merged, torch.full((2, 3), -torch.inf))


def test_lse_far_apart_neither_overflow_nor_vanish():
    lse = torch.tensor([[[-1e4], [1e4], [0.0], [1e4]]])
    o = torch.tensor([5.0, 1.0, 7.0, 3.0]).view(1, 4, 1, 1)
    out, merged = merge_attention_states(o, lse)
    assert out.item() == 2.0
    assert merged.item() == pytest.approx(1e4 + math.log(2))
    out, merged = merge_attention_states(o[:, :1], lse[:, :1])
    assert (out.item(), merged.item()) == (5.0, -1e4)


def test_nan_is_not_hidden():
    lse = torch.tensor([[[0.0], [torch.nan], [1.0]]])
    out, merged = merge_attention_states(torch.ones(1, 3, 1, 2), lse)
    assert bool(out.isnan().all()) and bool(merged.isnan().all())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)]
)
def test_every_type(dtype, tolerance):
    o, lse, indptr, _ = random_states([3, 0, 40], spread=3)
    o, lse = o.to(dtype), lse.float()
    found = merge_attention_states(o, lse, indptr)
    truth = merge_attention_states_ref(o.double(), lse.double(), indptr)
    assert found.out.dtype == dtype and found.lse.dtype == torch.float32
    torch.testing.assert_close(found.out.double(), truth.out, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.lse.double(), truth.lse, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 100), st.booleans())
def test_gradients_equal_those_of_the_definition(counts, seed, poisoned):
    o, lse, indptr, _ = random_states(counts, seed=seed)
    is_empty = lse == -torch.inf
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(*shape, generator=generator, dtype=torch.float64)
                for shape in ((len(counts), 3, 5), (len(counts), 3))]  # fmt: skip
    if poisoned:  # what an empty state holds takes no part
        o = torch.where(is_empty[..., None], torch.nan, o)
    found = []
    for merge in (merge_attention_states, merge_attention_states_ref):
        leaves = [o.clone().requires_grad_(), lse.clone().requires_grad_()]
        out, merged = merge(*leaves, indptr)
        loss = (out * upstream[0]).sum() + (merged * upstream[1])[merged > -torch.inf].sum()
        found.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    assert bool(found[0][0].isfinite().all())
    has_keys = ~is_empty
    assert_close([g[has_keys] for g in found[0]], [g[has_keys] for g in found[1]], 1e-12)
    assert not any(bool(g[is_empty].any()) for g in found[0])


def test_gradients_by_differences():
    o, lse, indptr, _ = random_states([4, 1], seed=3)
    o, lse = o.requires_grad_(), lse.clamp(min=-5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: merge_attention_states(*x, indptr), (o, lse))
    assert torch.autograd.gradcheck(lambda x: merge_attention_states(x, lse, indptr).out, o)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_registered_op_keeps_torchs_rules(dtype):
    o, lse, indptr, _ = random_states([2, 0, 3])
    lse = lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(raw, (o.to(dtype).requires_grad_(), lse.requires_grad_(), indptr))


def test_bases_of_logarithms():
    lse = torch.tensor([2.313262, -torch.inf])
    in_base_2 = lse_from_natural(lse)
    torch.testing.assert_close(in_base_2, torch.tensor([2.313262 / math.log(2), -torch.inf]))
    torch.testing.assert_close(lse_to_natural(in_base_2), lse)
    assert torch.equal(lse_to_natural(lse, math.e), lse)
    for base in (1.0, 0.5, -2.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="lse_base must be a number above 1"):
            lse_to_natural(lse, base)


def wrong_arguments():
    o, lse = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4)
    indptr = torch.tensor([0, 2], dtype=torch.int32)
    return [
        ((o.long(), lse), TypeError, "o must be float32 or"),
        ((o, lse.double()), TypeError, "lse must be float32, got torch.float64"),
        ((o[0], lse[0]), ValueError, r"o must be \[rows, states, heads, width\] without indptr"),
        ((o, lse, indptr), ValueError, r"o must be \[states, heads, width\] with indptr"),
        ((o, lse[:, :2]), ValueError, r"lse must be \[2, 3, 4\].*got \[2, 2, 4\]"),
        ((o[0], lse[0], indptr.long()), TypeError, "indptr must be int32"),
        ((o[0], lse[0], indptr[:0]), ValueError, r"indptr must be \[rows \+ 1\]"),
        ((o[0], lse[0], indptr * 2), ValueError, "indptr must ascend"),
        ((o[0], lse[0], -indptr), ValueError, "indptr must ascend"),
    ]


@pytest.mark.parametrize("number", range(len(wrong_arguments())))
def test_wrong_arguments_are_named(number):
    args, error, words = wrong_arguments()[number]
    with pytest.raises(error, match=words):
        merge_attention_states(*args)
