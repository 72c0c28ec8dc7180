"""Masked copies: the twin, exact counts, complements, independence of the layout, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from mask_problems import MASK, assert_same, calls, random_batch, rng_of
from torch._subclasses.fake_tensor import FakeTensorMode

from dlm_fast import _C
from dlm_fast.ops import mask_tokens, mask_tokens_ref
from dlm_fast.ops.mask_samplers import MIN_T, PAIRED, SAMPLERS
from dlm_fast.ops.mask_tokens import _mask_counts, _mask_fill


def copies_of(masked, sizes):
    """The packed copies as {(r, j): ids}."""
    copies, at = {}, 0
    for r, size in enumerate(sizes):
        for j in range(masked.counts.shape[1]):
            copies[r, j] = masked.noisy_ids[at : at + size]
            at += size
    assert at == masked.noisy_ids.numel()
    return copies


@settings(max_examples=120, deadline=None)
@given(calls())
def test_equals_the_definition_bit_for_bit(call):
    token_ids, maskable, options = call
    ours = mask_tokens(token_ids, maskable, MASK, **options)
    reference = mask_tokens_ref(token_ids, maskable, MASK, **options)
    assert_same(ours, reference)


@settings(max_examples=80, deadline=None)
@given(calls())
def test_only_maskable_tokens_and_exactly_as_many_as_said(call):
    token_ids, maskable, options = call
    lengths, count = options["lengths"], options["count"]
    masked = mask_tokens(token_ids, maskable, MASK, **options)
    clean = [ids.repeat(count) for ids in token_ids.split(lengths)]
    open_rows = [open_ids.repeat(count) for open_ids in maskable.split(lengths)]
    clean, open_rows = torch.cat([token_ids[:0], *clean]), torch.cat([maskable[:0], *open_rows])
    is_masked = masked.noisy_ids == MASK
    assert not (is_masked & ~open_rows).any()
    assert torch.equal(masked.noisy_ids[~is_masked], clean[~is_masked])
    assert torch.equal(masked.rows, is_masked.nonzero()[:, 0].to(torch.int32))
    assert torch.equal(masked.targets, clean[is_masked])
    for (r, j), ids in copies_of(masked, lengths).items():
        assert int((ids == MASK).sum()) == int(masked.counts[r, j])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weights(sampler):
    token_ids, maskable = random_batch(40, 13)
    masked = mask_tokens(token_ids, maskable, MASK, sampler=sampler, num_samples=4, rng=rng_of(40))
    length, count = maskable.sum(1, keepdim=True).double(), masked.counts.double()
    assert masked.weights.dtype == torch.float32
    weights = masked.weights.double()
    if sampler in PAIRED:
        assert (count[:, 0::2] + count[:, 1::2] == length).all()
        expected = torch.where(count > 0, (length + 1) / count, 0)
    elif sampler == "bern_t":
        assert ((weights > 1) & (weights < 1 / MIN_T)).all()
        return
    else:
        assert ((count >= 1) & (count <= length)).all()
        expected = length / count
    if sampler == "quad_t":  # the four weights of Gauss and Legendre on [0, 1]
        outer, inner = 0.17392742256872684, 0.3260725774312731
        node_weight = torch.tensor([outer, inner, inner, outer], dtype=torch.float64)
        expected = expected * 4 * node_weight
    assert torch.allclose(weights, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", sorted(PAIRED))
def test_pairs_partition_the_response(sampler):
    token_ids, maskable = random_batch(30, 11)
    masked = mask_tokens(token_ids, maskable, MASK, sampler=sampler, num_samples=6, rng=rng_of(30))
    copies = copies_of(masked, [11] * 30)
    sizes = set()
    for r in range(30):
        for p in range(3):
            left, right = copies[r, 2 * p] == MASK, copies[r, 2 * p + 1] == MASK
            assert torch.equal(left ^ right, maskable[r]) and not (left & right).any()
            sizes.add(int(left.sum()))
    assert 0 in sizes, "one side of a pair may be empty"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_layout_changes_nothing(sampler):
    """Splits of the samples, of the batch, prompts, padding on either side, flat or not."""
    rows, size, n = 5, 9, 6
    token_ids, maskable = random_batch(rows, size)
    rng = rng_of(rows)
    options = {"sampler": sampler, "num_samples": n}
    whole = mask_tokens(token_ids, maskable, MASK, rng=rng, **options)
    expected = copies_of(whole, [size] * rows)

    for first in range(n):
        for count in (1, n - first):
            part = mask_tokens(
                token_ids, maskable, MASK, rng=rng, first=first, count=count, **options
            )
            assert torch.equal(part.counts, whole.counts[:, first : first + count])
            assert torch.equal(part.weights, whole.weights[:, first : first + count])
            for (r, j), ids in copies_of(part, [size] * rows).items():
                assert torch.equal(ids, expected[r, first + j])

    order = torch.tensor([3, 0, 4])
    some = mask_tokens(token_ids[order], maskable[order], MASK, rng=rng.take(order), **options)
    for (r, j), ids in copies_of(some, [size] * 3).items():
        assert torch.equal(ids, expected[int(order[r]), j])

    for left, right in [(3, 0), (0, 4)]:
        padded_ids = torch.nn.functional.pad(token_ids, (left, right), value=7)
        padded_open = torch.nn.functional.pad(maskable, (left, right), value=False)
        padded = mask_tokens(padded_ids, padded_open, MASK, rng=rng, **options)
        for key, ids in copies_of(padded, [size + left + right] * rows).items():
            assert torch.equal(ids[left : left + size], expected[key])

    flat = mask_tokens(
        token_ids.reshape(-1), maskable.reshape(-1), MASK, rng=rng, lengths=[size] * rows, **options
    )
    assert all(torch.equal(a, b) for a, b in zip(flat, whole, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keys_and_draw_name_the_masks(sampler):
    token_ids, maskable = random_batch(1, 40, maskable=1.1)

    def ids(rng):
        options = {"sampler": sampler, "num_samples": 2, "rng": rng}
        return mask_tokens(token_ids, maskable, MASK, **options).noisy_ids

    base = rng_of(1)
    assert torch.equal(ids(base), ids(rng_of(1)))
    assert not torch.equal(ids(base), ids(rng_of(1, seed=1)))
    assert not torch.equal(ids(base), ids(base.at(draw=1)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_smallest_sequences(sampler):
    """No maskable token, one, and no sequence at all."""
    token_ids = torch.tensor([1, 2, 3, 4, 5])
    maskable = torch.tensor([False, False, True, False, False])
    options = {"sampler": sampler, "num_samples": 200, "rng": rng_of(3), "lengths": [2, 3, 0]}
    masked = mask_tokens(token_ids, maskable, MASK, **options)
    assert (masked.counts[[0, 2]] == 0).all() and (masked.weights[[0, 2]] == 0).all()
    assert set(masked.targets.tolist()) == {3}
    one = masked.counts[1]
    if sampler in PAIRED:  # k is 0 or 1: one of the two sides is empty and has no weight
        assert (one[0::2] + one[1::2] == 1).all()
        assert torch.equal(masked.weights[1], 2.0 * one)
    elif sampler == "bern_t":
        assert set(one.tolist()) == {0, 1}
    else:
        assert (one == 1).all()
        assert sampler == "quad_t" or (masked.weights[1] == 1).all()
    options |= {"rng": rng_of(0), "lengths": []}
    empty = mask_tokens(token_ids[:0], maskable[:0], MASK, **options)
    assert empty.counts.shape == (0, 200)
    assert empty.noisy_ids.numel() == empty.rows.numel() == empty.targets.numel() == 0


@pytest.mark.parametrize("sampler", ["l_iid", "l_strat", "l_linspace"])
def test_extreme_counts(sampler):
    """One masked token weighs L, all of them weigh 1."""
    token_ids, maskable = random_batch(20, 5, maskable=1.1)
    masked = mask_tokens(token_ids, maskable, MASK, sampler=sampler, num_samples=10, rng=rng_of(20))
    assert (masked.weights[masked.counts == 1] == 5).all() and (masked.counts == 1).any()
    assert (masked.weights[masked.counts == 5] == 1).all() and (masked.counts == 5).any()
    whole = [ids for ids in copies_of(masked, [5] * 20).values() if (ids == MASK).all()]
    assert len(whole) == int((masked.counts == 5).sum())


def test_strided_input_is_read_not_changed():
    token_ids, maskable = random_batch(8, 9)
    token_ids, maskable = token_ids.t()[:, ::2], maskable.t()[:, ::2]
    before = token_ids.clone()
    options = {"sampler": "l_strat", "num_samples": 3, "rng": rng_of(18).take(range(0, 18, 2))}
    ours = mask_tokens(token_ids, maskable, MASK, **options)
    reference = mask_tokens_ref(token_ids, maskable, MASK, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
    assert torch.equal(token_ids, before)


def test_thread_count_changes_nothing():
    token_ids, maskable = random_batch(50, 64)
    before = torch.get_num_threads()
    try:
        for sampler in SAMPLERS:
            options = {"sampler": sampler, "num_samples": 4, "rng": rng_of(50)}
            torch.set_num_threads(1)
            one = mask_tokens(token_ids, maskable, MASK, **options)
            torch.set_num_threads(3)
            three = mask_tokens(token_ids, maskable, MASK, **options)
            assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sampler", ["l_strat", "coupled", "quad_t"])
def test_opcheck(sampler):
    token_ids, maskable = random_batch(3, 6)
    keys, start = rng_of(3).keys, torch.tensor([0, 6, 12, 18])
    samples = [4, 1, 3, 5]
    quadrature = torch.rand(2, 4, dtype=torch.float64)
    args = (keys, maskable.sum(1), SAMPLERS.index(sampler), samples, quadrature)
    torch.library.opcheck(torch.ops.dlm_fast.mask_counts, args)
    counts, _ = _mask_counts(*args)
    flat = (token_ids.reshape(-1), maskable.reshape(-1), start, keys, counts, MASK)
    fill = (*flat, sampler in PAIRED, samples, int(counts.sum()))
    torch.library.opcheck(torch.ops.dlm_fast.mask_fill, fill)
    with pytest.raises(ValueError, match="sum of counts"):
        _mask_fill(*fill[:-1], int(counts.sum()) + 1)


def test_bad_input():
    token_ids, maskable = random_batch(2, 5, maskable=1.1)
    good = {"sampler": "l_strat", "num_samples": 4, "rng": rng_of(2)}

    def fails(error, match, ids=token_ids, open_ids=maskable, mask_id=MASK, **changes):
        for call in (mask_tokens, mask_tokens_ref):
            with pytest.raises(error, match=match):
                call(ids, open_ids, mask_id, **good | changes)

    fails(ValueError, "did you mean 'l_strat'", sampler="l_start")
    fails(ValueError, "sampler must be one of", sampler=None)
    fails(ValueError, "num_samples must be at least 1, got 0", num_samples=0)
    fails(TypeError, "float", num_samples=2.5)
    for sampler in sorted(PAIRED):
        fails(ValueError, "must be even, got 3; take 4", sampler=sampler, num_samples=3)
    for first, count in [(-1, 2), (0, 5), (3, 2), (4, None), (0, 0)]:
        fails(ValueError, r"lie in 0\.\.4", first=first, count=count)
    fails(ValueError, "one key per sequence, got 3 for 2", rng=rng_of(3))
    fails(ValueError, "position or step", rng=rng_of(2).at(step=1))
    fails(ValueError, "position or step", rng=rng_of(2).at(position=1))
    fails(TypeError, "token_ids must be int64", ids=token_ids.int())
    fails(TypeError, "maskable must be bool", open_ids=maskable.int())
    fails(ValueError, r"shape \[2, 5\] of token_ids", open_ids=maskable[:, :4])
    fails(ValueError, "flat .* without lengths", ids=token_ids[0], open_ids=maskable[0])
    fails(ValueError, "with lengths", lengths=[5, 5])
    flat = {"ids": token_ids.reshape(-1), "open_ids": maskable.reshape(-1)}
    fails(ValueError, "sum to the 10 tokens, got sum 9", **flat, lengths=[5, 4])
    fails(ValueError, "not be negative", **flat, lengths=[11, -1])
    masked_already = token_ids.clone()
    masked_already[1, 3] = MASK
    fails(ValueError, r"token_ids\[1, 3\] is mask_id=99", ids=masked_already)
    not_maskable = maskable.clone()
    not_maskable[1, 3] = False
    assert mask_tokens(masked_already, not_maskable, MASK, **good).noisy_ids.numel() == 40
    huge = torch.zeros(1, dtype=torch.int64).expand(2, 2**20)
    fails(ValueError, "int32", ids=huge, open_ids=huge != 0, num_samples=2**12)
    with pytest.raises(ValueError, match="num_samples"):
        _C.mask_counts_cpu(0, 0, 0, 0, 0, False, 0, 0.0, 0, 0, 0, 0, 0, 1)


def test_devices_must_agree():
    token_ids, maskable = random_batch(2, 5)
    options = {"sampler": "l_iid", "num_samples": 1}
    with pytest.raises(ValueError, match="maskable lies on meta; move it"):
        mask_tokens(token_ids, maskable.to("meta"), MASK, rng=rng_of(2), **options)
    with pytest.raises(ValueError, match="rng lies on meta; move it"):
        mask_tokens(token_ids, maskable, MASK, rng=rng_of(2).to("meta"), **options)


def test_the_masks_stay_on_their_device():
    counts = torch.ones(1, 2, dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        token_ids = torch.zeros(3, dtype=torch.int64, device="cuda")
        start, keys = torch.tensor([0, 3]), torch.zeros(1, dtype=torch.int64)
        samples = [2, 0, 2, 0]
        outputs = _mask_fill(token_ids, token_ids > 0, start, keys, counts, MASK, False, samples, 2)
    assert [t.shape[0] for t in outputs] == [6, 2, 2]
    assert all(t.device == token_ids.device for t in outputs)
    assert [t.dtype for t in outputs] == [torch.int64, torch.int32, torch.int64]
