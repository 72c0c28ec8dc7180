"""The kernel of attention over prefix trees, emulated: equal to the definition on every plan."""

from __future__ import annotations

import pytest
import torch
from attention_problems import assert_close
from device_runs import on_emulator
from tree_problems import (
    leaves_of,
    level_tree,
    make_pool,
    path_length,
    queries,
    random_forest,
    truth,
)

from dlm_fast import _C
from dlm_fast.ops import plan_tree_attention, tree_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def attend(run, pool, nodes, counts=1, **options):
    plan = run(plan_tree_attention, pool, nodes, counts, **options)
    q = queries(plan, pool)
    found, expected = run(tree_attention, q, pool, plan), truth(q, pool, plan)
    error = (found.out.double() - expected[0]).abs()
    assert found.out.dtype == pool.dtype and error.max() < TOLERANCE[pool.dtype]
    assert_close([found.lse.double()], expected[1:], 1e-5)
    return found


def check(run, dtype, width):
    """A root with more lines than a block takes at once, nodes of few lines, an empty tail, tiles
    and pages cut anywhere; heads of the kernel's width and of one that ends inside a chunk."""
    for d, heads, key_heads, page in ((width, 4, 1, 16), (width - 13, 3, 3, 4)):
        pool = make_pool(key_heads, d, page, dtype)
        nodes = level_tree(pool, [1, 2, 10], [43, 7, 0])
        attend(run, pool, nodes, query_heads=heads, absorb="never", row_tile=9)
        attend(run, pool, nodes[:3], [3, 1, 5], query_heads=heads, causal=True, chunk=20)


@pytest.mark.covers(*(f"tree_attention_f32_{width}" for width in (64, 128, 256)))
def test_float32(run):
    for width in (64, 128, 256):
        check(run, torch.float32, width)


@pytest.mark.covers(*(f"tree_attention_bf16_{width}" for width in (64, 128, 256)))
def test_bfloat16(run):
    for width in (64, 128, 256):
        check(run, torch.bfloat16, width)


@pytest.mark.covers(*(f"tree_attention_f16_{width}" for width in (64, 128, 256)))
def test_float16(run):
    for width in (64, 128, 256):
        check(run, torch.float16, width)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("causal", [False, True])
def test_random_forests(seed, causal):
    run = on_emulator("random", seed)
    layout = ("token", "head")[seed % 2]
    pool = make_pool(2, (8, 24, 33)[seed % 3], 4, layout=layout)
    nodes = random_forest(pool, seed, 2, 3, 3, 50)
    counts = [min(1 + seed % 3, path_length(pool, node)) for node in nodes]
    for absorb in ("by_cost", "never", "always"):
        options = {"query_heads": 6, "absorb": absorb, "causal": causal}
        attend(run, pool, nodes, counts, chunk=(None, 17)[seed % 2], **options)


@pytest.mark.parametrize("keys", [31, 32, 33, 64, 65])
def test_the_ends_of_tiles(run, keys):
    pool = make_pool(1, 16, 8)
    leaves = level_tree(pool, [1, 2], [keys, 1])
    attend(run, pool, leaves, query_heads=2, absorb="never")


@pytest.mark.parametrize("heads", [31, 32, 33, 65])
def test_more_lines_than_a_block_takes(run, heads):
    """A key head with many query heads: lines of one row go in several turns."""
    pool = make_pool(1, 8, 4)
    attend(run, pool, level_tree(pool, [1, 2], [37, 5]), query_heads=heads, absorb="never")


def test_a_row_that_sees_no_key(run):
    pool = make_pool(1, 8)
    empty, (full,) = pool.alloc(), level_tree(pool, [1], [5])
    found = attend(run, pool, [empty, full], query_heads=2)
    assert torch.equal(found.out[0], torch.zeros(2, 8))
    assert torch.equal(found.lse[0], torch.full((2,), -torch.inf))
    assert attend_nothing(run, pool).shape == (0, 2, 8)


def attend_nothing(run, pool):
    plan = run(plan_tree_attention, pool, [], query_heads=2)
    return run(tree_attention, torch.zeros(0, 2, 8), pool, plan).out


@pytest.mark.parametrize("kind", [0, 1])
def test_nan_reaches_the_rows_that_see_it_alone(run, kind):
    pool = make_pool(1, 8)
    leaves = level_tree(pool, [1, 2], [20, 7])
    plan = run(plan_tree_attention, pool, leaves, 3, query_heads=2, causal=True)
    q = queries(plan, pool)
    clean = run(tree_attention, q, pool, plan).out
    slot = int(pool.slots(leaves[0])[5])
    pool.layer(0)[slot // 16, kind, slot % 16] = torch.nan
    found = run(tree_attention, q, pool, plan).out
    assert torch.equal(found[[0, 3, 4, 5]], clean[[0, 3, 4, 5]])
    assert bool(found[1:3].isnan().all())


def test_bits_do_not_depend_on_the_order_of_threads():
    pool = make_pool(2, 40, 4, torch.bfloat16)
    leaves = leaves_of(pool, random_forest(pool, 8, 1, 3, 3, 40))
    found = [
        attend(on_emulator(order, seed), pool, leaves, query_heads=4)
        for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
    ]
    assert all(torch.equal(f.out, found[0].out) and torch.equal(f.lse, found[0].lse) for f in found)


def test_rows_that_are_not_aligned(run):
    """Keys behind an odd number: no 16 bytes at once."""
    pool = make_pool(1, 64, 4, torch.bfloat16)
    leaves = level_tree(pool, [1, 2], [9, 3])
    held = pool.layer(0)
    moved = torch.empty(held.numel() + 1, dtype=held.dtype)[1:].view_as(held)
    moved.copy_(held)
    pool._layers[0] = moved
    assert pool.layer(0).data_ptr() % 16
    attend(run, pool, leaves, query_heads=2)


def launches(width=64, dtype=1, rows=3, heads=(8, 2), items=5, merges=2):
    sizes = (items, 4, 6, 9, merges, 7)
    inputs = _C.TreeAttentionInputs(
        (6, *heads, width), dtype, (8, 8, 8), (16, 16, 64, 32, 16, 8), 8, sizes, 1.0, 1
    )
    return _C.plan_tree_attention(inputs, (8, 8, 8, 8), rows)


def test_plans():
    stage, merge = launches()
    rows, lines = 2 * 32 * (64 * 2 + 16), 32 * (64 + 32) * 4
    assert stage[:5] == ("tree_attention_bf16_64", (5, 2), 128, 1, rows + lines + 32 * 8)
    assert merge[:4] == ("attention_merge_bf16", (2, 2), 128, 1)
    assert launches(rows=5)[0][2] == 256 and launches(rows=4)[0][2] == 128
    assert launches(width=65)[0][0] == "tree_attention_bf16_128"
    assert launches(width=129, dtype=0)[0][0] == "tree_attention_f32_256"
    assert len(launches(items=0)) == len(launches(merges=0)) == 1
    for wrong, words in [
        ({"width": 257}, "heads of width 257 have no CUDA kernel"),
        ({"dtype": 3}, "float64 is left to the CPU"),
        ({"heads": (3, 2)}, "must be a multiple of key heads"),
        ({"heads": (3, 0)}, "heads are missing"),
        ({"rows": 0}, "no items"),
    ]:
        with pytest.raises(ValueError, match=words):
            launches(**wrong)
