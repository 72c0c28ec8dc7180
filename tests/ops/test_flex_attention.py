"""The CUDA path of interval_attention, by FlexAttention: tiles, cache, forward on the CPU."""

import gc

import pytest
import torch
from attention_problems import assert_close, free_intervals, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.ops import Visibility, interval_attention_ref
from dlm_fast.ops import _flex_attention as flex
from dlm_fast.ops.visibility import dense_mask

PATTERNS = {
    "ragged": (Visibility.full([200, 1, 130]).intervals, 331),
    "causal": (Visibility.causal([300]).intervals, 300),
    "block causal": (Visibility.block_causal([129, 256], 4).intervals, 385),
    "random": (free_intervals(70, 260, 5), 70),
    "nobody": (torch.zeros(140, 4, dtype=torch.int32), 9),
}


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_equals_the_definition(pattern, heads):
    intervals, queries = PATTERNS[pattern]
    tensors = [x.detach() for x in random_qkv(queries, len(intervals), *heads, 16)]
    found = flex.flex_interval_attention(*tensors, intervals, 0.3)
    assert_close([found], [interval_attention_ref(*tensors, intervals, 0.3)])


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_nothing_to_attend(queries, keys):
    tensors = random_qkv(queries, keys)
    intervals = torch.zeros(keys, 4, dtype=torch.int32)
    out = flex.flex_interval_attention(*tensors, intervals, 1.0)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert out.shape == (queries, 4, 6) and not any(bool(x.any()) for x in (out, *gradients))


@settings(max_examples=50)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000), st.integers(1, 3))
def test_tiles_cover_what_is_seen(queries, keys, seed, coarse):
    # long runs of equal intervals, or no tile would ever be full
    intervals = free_intervals(queries, -(-keys // 100**coarse), seed)
    intervals = intervals.repeat_interleave(100**coarse, 0)[:keys].contiguous()
    seen, full = flex.tiles_of(intervals, queries)
    mask = dense_mask(intervals, queries)
    for m, rows in enumerate(mask.split(flex.TILE)):
        for n, tile in enumerate(rows.split(flex.TILE, 1)):
            assert bool(seen[m, n]) or not bool(tile.any())
            assert not bool(full[m, n]) or (bool(tile.all()) and tile.numel() == flex.TILE**2)


def test_empty_tiles_are_skipped_and_full_ones_are_not_tested():
    seen, full = flex.tiles_of(Visibility.full([256, 128]).intervals, 384)
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(seen, expected) and torch.equal(full, expected)
    mask = flex.block_mask_of(Visibility.block_causal([384], 4).intervals, 384)
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 1]]]
    assert [int(mask.kv_indices[0, 0, m, 0]) for m in range(3)] == [0, 1, 2]
    assert mask.full_kv_num_blocks.tolist() == [[[0, 1, 2]]]
    assert mask.full_kv_indices[0, 0, 2, :2].tolist() == [0, 1]


def test_the_block_mask_is_kept_with_the_intervals():
    intervals = Visibility.causal([200]).intervals
    first = flex.block_mask_of(intervals, 200)
    assert flex.block_mask_of(intervals, 200) is first
    assert flex.block_mask_of(intervals.clone(), 200) is not first
    intervals[0, 1] = 150
    changed = flex.block_mask_of(intervals, 200)
    assert changed is not first
    tensors = [x.detach() for x in random_qkv(200, 200, 1, 1, 16)]
    found = flex.flex_interval_attention(*tensors, intervals, 1.0)
    assert_close([found], [interval_attention_ref(*tensors, intervals, 1.0)])
    kept = len(flex._block_masks)
    del intervals, changed, first
    gc.collect()
    assert len(flex._block_masks) < kept
