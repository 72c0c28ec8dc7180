"""Attention under intervals equals its definition: values, gradients, on every instruction set."""

import pytest
import torch
from attention_problems import (
    assert_close,
    exact,
    free_intervals,
    free_visibility,
    random_qkv,
    values_and_gradients,
)
from head_problems import LEVELS, relative_error, simd_level, threads
from hypothesis import given
from hypothesis import strategies as st

from dlm_fast.ops import Visibility, interval_attention, interval_attention_ref

raw = torch.ops.dlm_fast.interval_attention.default


def trace_intervals(clean, block, rounds):
    """A clean stream and, per block and round, a noisy chunk; and the number of rows."""
    blocks = clean // block
    total = clean + blocks * rounds * block
    intervals = [
        [b * block, clean, clean + (b + 1) * rounds * block, total]
        for b in range(blocks)
        for _ in range(block)
    ]
    for start in range(clean, total, block):
        intervals += [[start, start + block, 0, 0]] * block
    return torch.tensor(intervals, dtype=torch.int32), total


def both(tensors, intervals, scale=None):
    fast = values_and_gradients(lambda *t: interval_attention(*t, intervals, scale), tensors)
    slow = lambda *t: interval_attention_ref(*t, intervals, scale)  # noqa: E731
    return fast, values_and_gradients(slow, exact(tensors))


@given(
    st.integers(0, 40),
    st.integers(0, 200),
    st.sampled_from([(1, 1), (2, 1), (3, 3), (8, 2), (7, 1), (8, 8)]),
    st.sampled_from([1, 4, 7, 24, 33]),
    st.integers(0, 1000),
)
def test_random_intervals_in_float64(queries, keys, heads, width, seed):
    tensors = random_qkv(queries, keys, *heads, width, seed)
    fast, slow = both(tensors, free_intervals(queries, keys, seed), 0.3 + seed / 1000)
    assert_close(fast, slow, 1e-10)


PATTERNS = {
    "full": lambda: Visibility.full([200, 1, 84, 0, 130]).intervals,
    "causal": lambda: Visibility.causal([300, 115]).intervals,
    "block causal": lambda: Visibility.block_causal([97, 318], 4).intervals,
    "clean and noisy": lambda: trace_intervals(64, 8, 5)[0],
    "random": lambda: free_intervals(260, 345, 5),
    "few queries": lambda: free_intervals(5, 400, 6),
    "one query": lambda: torch.tensor([[0, 1, 1, 1]] * 100, dtype=torch.int32),
}
WIDTHS = {"full": 64, "causal": 128, "block causal": 4, "clean and noisy": 80, "random": 33}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_instruction_set_in_float32(pattern, level):
    intervals = PATTERNS[pattern]()
    queries = int(intervals.max())
    width = WIDTHS.get(pattern, 256)
    tensors = random_qkv(queries, len(intervals), 6, 2, width, dtype=torch.float32)
    with simd_level(level):
        fast, slow = both(tensors, intervals)
    assert_close([x.double() for x in fast], slow, 2e-5)
    for ours, truth in zip(fast, slow, strict=True):
        assert relative_error(ours.detach(), truth.detach()) < 2e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str
)
def test_16_bit_results_are_rounded_once(dtype, tolerance, level):
    """The sums are float32: what is left is the rounding of results, and of out in delta."""
    intervals = PATTERNS["block causal"]()
    tensors = random_qkv(415, 415, 4, 2, 40, dtype=dtype)
    with simd_level(level):
        fast, slow = both(tensors, intervals)
    for ours, truth in zip(fast, slow, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.detach(), truth.detach()) < tolerance


@pytest.mark.parametrize("level", LEVELS)
def test_results_do_not_depend_on_the_number_of_threads(level):
    intervals, rows = trace_intervals(256, 16, 2)
    tensors = random_qkv(rows, rows, 4, 2, 20, dtype=torch.float32)
    found = []
    for count in (1, 2, 5):
        with simd_level(level), threads(count):
            fast = values_and_gradients(lambda *t: interval_attention(*t, intervals), tensors)
            found.append([*fast, raw(*tensors, intervals, 0.2)[1]])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
def test_bad_rows_reach_those_that_see_them_alone(which, bad, level):
    queries, keys = 100, 190
    intervals = free_intervals(queries, keys, 4)
    mask = Visibility(
        intervals=intervals,
        position_ids=torch.arange(queries),
        pred=torch.full((queries,), -1, dtype=torch.int32),
    ).dense()
    clean = random_qkv(queries, keys, 2, 1, 24, dtype=torch.float32)
    upstream = torch.randn(queries, 2, 24, generator=torch.Generator().manual_seed(1))
    row = 40 if which in ("q", "grad_out") else 100
    assert 0 < int(mask[row].sum() if row == 40 else mask[:, row].sum()) < queries

    def run(poisoned):
        named = dict(zip(("q", "k", "v"), (x.detach().clone() for x in clean), strict=True))
        named["grad_out"] = upstream.clone()
        if poisoned:
            named[which][row, :, 3] = bad
        leaves = [named[name].requires_grad_() for name in ("q", "k", "v")]
        with simd_level(level):
            out = interval_attention(*leaves, intervals)
            return [out.detach(), *torch.autograd.grad(out, leaves, named["grad_out"])]

    if which in ("q", "grad_out"):
        bad_rows = torch.arange(queries) == row
    else:
        bad_rows = mask[:, row]
    bad_keys = mask[bad_rows].any(0)
    assert not bool(bad_keys.all())
    for before, after in zip(run(False), run(True), strict=True):
        untouched = ~(bad_rows if len(after) == queries else bad_keys)
        assert torch.equal(before[untouched], after[untouched])
    after = run(True)
    if which == "grad_out":
        assert torch.equal(after[0], run(False)[0])
    elif bad != bad:
        assert bool(after[0][bad_rows].isnan().any(-1).all())
    assert not bool(after[2][bad_keys].isfinite().all())


def test_rows_that_see_nothing_give_zeros():
    intervals = torch.tensor([[0, 3, 5, 6]] * 90, dtype=torch.int32)
    tensors = random_qkv(7, 90, dtype=torch.float32)
    out, lse = raw(*tensors, intervals, 1.0)
    unseen = torch.tensor([False, False, False, True, True, False, True])
    assert torch.equal(out[unseen], torch.zeros(3, 4, 6))
    assert torch.equal(lse[unseen], torch.full((3, 4), -torch.inf))
    (gradient,) = torch.autograd.grad(out.sum(), tensors[0])
    assert torch.equal(gradient[unseen], torch.zeros(3, 4, 6))
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 5), (5, 0)])
def test_nothing_to_attend(queries, keys):
    tensors = random_qkv(queries, keys)
    intervals = torch.zeros(keys, 4, dtype=torch.int32)
    for result, shape in zip(
        values_and_gradients(lambda *t: interval_attention(*t, intervals), tensors),
        [(queries, 4, 6), (queries, 4, 6), (keys, 2, 6), (keys, 2, 6)],
        strict=True,
    ):
        assert torch.equal(result, torch.zeros(shape, dtype=torch.float64))


def test_views_of_any_stride():
    """As a policy hands them over, [heads, rows, width] turned, and with numbers apart."""
    intervals = free_intervals(50, 90, 3)
    plain = random_qkv(50, 90)
    expected = values_and_gradients(lambda *t: interval_attention(*t, intervals), plain)
    with torch.no_grad():
        turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain]
        apart = [torch.stack([x, x], -1)[..., 0] for x in plain]
        parts = [torch.cat([x, x], 2)[..., : x.shape[2]] for x in plain]
    for views in (turned, apart, parts):
        assert not any(x.is_contiguous() for x in views)
        leaves = [x.requires_grad_() for x in views]
        found = values_and_gradients(lambda *t: interval_attention(*t, intervals), leaves)
        assert_close(found, expected, 0)
    one_head = [x[:, :1].detach() for x in plain[1:]]
    spread = [x.expand(-1, 2, -1) for x in one_head]
    repeated = [x.repeat(1, 2, 1) for x in one_head]
    args = plain[0].detach(), intervals
    assert torch.equal(
        interval_attention(args[0], *spread, args[1]),
        interval_attention(args[0], *repeated, args[1]),
    )


def test_log_sum_exp_and_its_gradient():
    intervals = free_intervals(30, 100, 8)
    tensors = random_qkv(30, 100, 4, 2, 5)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    _, lse = raw(*tensors, intervals, 0.5)
    mask = free_visibility(30, 100, 8).dense()
    q, k, _ = leaves = exact(tensors)
    score = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.5
    truth = torch.logsumexp(score.masked_fill(~mask, -torch.inf), -1).T
    sees = mask.any(1)
    assert_close([lse[sees]], [truth[sees]])
    found = torch.autograd.grad((lse * weight)[sees].sum(), tensors)
    expected = torch.autograd.grad((truth * weight)[sees].sum(), leaves, materialize_grads=True)
    assert_close(found, expected, 1e-10)


def test_large_scores():
    """Values as exact as plain float32; gradients lose what rounding lse to float32 loses."""
    tensors = random_qkv(40, 150, 2, 1, 16, dtype=torch.float32)
    with torch.no_grad():
        tensors[0] *= 300
    intervals = torch.tensor([[0, 40, 0, 0]] * 150, dtype=torch.int32)
    fast, truth = both(tensors, intervals, 1.0)
    plain = interval_attention_ref(*tensors, intervals, 1.0).detach()
    assert relative_error(fast[0], truth[0]) < 2 * relative_error(plain, truth[0])
    largest = float(raw(*tensors, intervals, 1.0)[1].detach().abs().max())
    for ours, exactly in zip(fast[1:], truth[1:], strict=True):
        assert relative_error(ours, exactly) < 10 * largest * 2**-24


def test_long_packs_hold_no_square():
    """40,000 rows: one bit for each pair would be 200 MB, and this takes milliseconds."""
    visibility = Visibility.full([40] * 1000)
    q, k, v = random_qkv(40000, 40000, 1, 1, 8, dtype=torch.float32)
    out = interval_attention(q, k, v, visibility)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.detach().view(1000, 40, 8) for x in (q, k, v))
    )
    torch.testing.assert_close(out.view(1000, 40, 8), dense, rtol=0, atol=2e-5)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


def test_gradients_by_differences():
    intervals = free_intervals(6, 9, 1)
    tensors = random_qkv(6, 9, 2, 1, 3)
    assert torch.autograd.gradcheck(lambda *t: interval_attention(*t, intervals), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_registered_op_keeps_torchs_rules(dtype):
    intervals = free_intervals(9, 12, 1)
    torch.library.opcheck(raw, (*random_qkv(9, 12, dtype=dtype), intervals, 0.5))


def test_second_derivatives_are_refused():
    q, k, v = random_qkv(4, 4)
    out = interval_attention(q, k, v, Visibility.full([4]))
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivatives.*interval_attention_ref"):
        gradient.sum().backward()


def wrong_arguments():
    q, k, v = (x.detach() for x in random_qkv(4, 4))
    seen = Visibility.full([4])
    return [
        ((q.long(), k, v, seen), TypeError, "q must be float32 or .* got torch.int64"),
        ((q, k.float(), v, seen), TypeError, "k must be float64, got torch.float32"),
        ((q[0], k, v, seen), ValueError, r"q must be \[rows, heads, width\].*\[4, 6\]"),
        ((q, k, v[:3], seen), ValueError, r"k \[4, 2, 6\] and v \[3, 2, 6\] must have one shape"),
        ((q, k, v, Visibility.full([3])), ValueError, "the 3 rows of the visibility"),
        ((q[:, :3], k, v, seen), ValueError, "3 query heads of q are not a multiple of the 2"),
        ((q[..., :5], k, v, seen), ValueError, "q has heads of width 5, but k and v of 6"),
        ((q, k, v, seen.intervals.long()), TypeError, "visibility must be int32, got torch.int64"),
        ((q, k, v, seen.intervals[:, :3]), ValueError, r"intervals \[keys, 4\], got \[4, 3\]"),
        ((q, k, v, seen.intervals + 1), ValueError, "disjoint ranges .* of key 0 are not"),
        ((q, k, v, seen.to("meta")), ValueError, "visibility lies on meta but q on cpu"),
    ]


@pytest.mark.parametrize("number", range(len(wrong_arguments())))
def test_wrong_arguments_are_named(number):
    args, error, words = wrong_arguments()[number]
    with pytest.raises(error, match=words):
        interval_attention(*args)


def two_keys(intervals):
    q, k, v = random_qkv(4, 2)
    return interval_attention(q, k, v, torch.tensor([[0, 4, 4, 4], intervals], dtype=torch.int32))


@pytest.mark.parametrize("intervals", [[0, 3, 2, 4], [2, 1, 0, 0], [-1, 1, 2, 2], [0, 4, 4, 5]])
def test_intervals_that_are_no_disjoint_ranges_are_refused(intervals):
    with pytest.raises(ValueError, match="those of key 1 are not"):
        two_keys(intervals)


def test_an_empty_interval_may_lie_anywhere():
    assert torch.equal(two_keys([1, 3, 2, 2]), two_keys([0, 0, 1, 3]))
