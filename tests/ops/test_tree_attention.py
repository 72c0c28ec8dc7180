"""Attention over shared prefixes equals plain attention over every row's own path."""

from __future__ import annotations

import random

import pytest
import torch
from attention_problems import assert_close
from head_problems import LEVELS, simd_level, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_problems import (
    extend,
    leaves_of,
    level_tree,
    make_pool,
    path_length,
    plans,
    queries,
    random_forest,
    truth,
)

from dlm_fast.ops import (
    Visibility,
    interval_attention,
    merge_attention_states,
    plan_tree_attention,
    tree_attention,
    tree_attention_ref,
)

raw = torch.ops.dlm_fast.tree_attention.default


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1, 8), (4, 1, 5), (14, 2, 24), (8, 1, 33), (6, 6, 3)]),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
)
def test_random_forests_in_float64(seed, shape, page, causal):
    heads, key_heads, width = shape
    rng = random.Random(seed)
    layout = rng.choice(["token", "head"])
    pool = make_pool(key_heads, width, page, torch.float64, layout=layout)
    nodes = random_forest(pool, seed, rng.randint(1, 3), rng.randint(0, 3), 4, 30)
    rng.shuffle(nodes)
    counts = [rng.randint(0, 4) for _ in nodes]
    if causal:
        counts = [min(n, path_length(pool, node)) for n, node in zip(counts, nodes, strict=True)]
    for plan in plans(pool, nodes, counts, query_heads=heads, causal=causal):
        q = queries(plan, pool)
        assert_close(tree_attention(q, pool, plan), truth(q, pool, plan), 1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (14, 2), (8, 1), (32, 1)])
def test_every_grouping_and_width_on_every_instruction_set(heads, width, level):
    """A root whose lines fill panels, nodes of a few lines each, a page boundary inside and at the
    end of nodes, an empty tail."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pool = make_pool(heads[1], width, 16, dtype)
        nodes = level_tree(pool, [1, 2, 6, 12], [70, 16, 23, 0])
        plan = plan_tree_attention(pool, nodes, query_heads=heads[0], absorb="never")
        q = queries(plan, pool)
        with simd_level(level):
            found = tree_attention(q, pool, plan)
        expected = truth(q, pool, plan)
        error = (found.out.double() - expected[0]).abs()
        assert found.out.dtype == dtype
        if dtype == torch.float32:
            assert error.max() < 1e-5
        else:
            assert error.max() < 2e-2 and error.mean() < 2e-3
        assert (found.lse.double() - expected[1]).abs().max() < 1e-5


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("depth", [1, 4, 12])
def test_deep_trees_with_long_nodes(depth, page):
    pool = make_pool(2, 64, page)
    sizes = [700, 1, page, page - 1, page + 1, 333][: depth + 1]
    sizes += [17] * (depth + 1 - len(sizes))
    leaves = level_tree(pool, [min(2**i, 16) for i in range(depth + 1)], sizes)
    for plan in plans(pool, leaves, query_heads=8):
        q = queries(plan, pool)
        assert_close(
            [x.double() for x in tree_attention(q, pool, plan)], truth(q, pool, plan), 1e-5
        )


def test_many_trees_and_a_single_leaf():
    pool = make_pool(1, 24, 4)
    leaves = leaves_of(pool, random_forest(pool, 3, trees=256, depth=2, fan_out=2, size=9))
    for nodes in (leaves, leaves[:1], [leaves[5]] * 3):
        plan = plan_tree_attention(pool, nodes, query_heads=2)
        q = queries(plan, pool)
        assert_close(
            [x.double() for x in tree_attention(q, pool, plan)], truth(q, pool, plan), 1e-5
        )


def test_a_wide_fan_out():
    pool = make_pool(1, 16)
    leaves = level_tree(pool, [1, 16, 256], [100, 20, 3])
    for plan in plans(pool, leaves, query_heads=7):
        q = queries(plan, pool)
        assert_close(
            [x.double() for x in tree_attention(q, pool, plan)], truth(q, pool, plan), 1e-5
        )


def test_a_row_that_sees_no_key():
    pool = make_pool()
    empty = pool.alloc()
    full = level_tree(pool, [1], [5])[0]
    plan = plan_tree_attention(pool, [empty, full, empty], [2, 1, 0], query_heads=2)
    found = tree_attention(queries(plan, pool), pool, plan)
    assert torch.equal(found.out[:2], torch.zeros(2, 2, 16)) and bool(found.out[2].any())
    assert torch.equal(found.lse[:2], torch.full((2, 2), -torch.inf))
    nothing = plan_tree_attention(pool, [], query_heads=2)
    assert tree_attention(torch.zeros(0, 2, 16), pool, nothing).out.shape == (0, 2, 16)


def test_a_prefill_of_a_tree_equals_its_packed_rows():
    """Every node's tokens attend causally: ``interval_attention`` under ``Visibility.tree``."""
    pool = make_pool(2, 32, 4)
    nodes = random_forest(pool, 11, depth=4, fan_out=3, size=30)
    facts = [pool.node(node) for node in nodes]
    parents = [nodes.index(f.parent) if f.parent >= 0 else -1 for f in facts]
    lengths = [f.length for f in facts]
    keys, values = (
        torch.cat(x) for x in zip(*(pool.read(0, pool.slots(n)) for n in nodes), strict=True)
    )
    for plan in plans(pool, nodes, lengths, query_heads=4, causal=True):
        q = queries(plan, pool)
        packed = interval_attention(q, keys, values, Visibility.tree(parents, lengths))
        torch.testing.assert_close(tree_attention(q, pool, plan).out, packed, rtol=0, atol=1e-5)


def test_a_block_beside_the_pool():
    """The noisy rows of a block see the path, and one another through keys outside of the pool."""
    pool = make_pool(2, 24, 8)
    leaves = level_tree(pool, [1, 2, 4], [24, 8, 16])
    before = pool.stats
    plan = plan_tree_attention(pool, leaves, 8, query_heads=4)
    q = queries(plan, pool)
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, 32, 2, 24, generator=generator)
    block = torch.ops.dlm_fast.interval_attention(
        q, key, value, Visibility.full([8] * 4).intervals, pool.width**-0.5
    )
    path = tree_attention(q, pool, plan)
    merged = merge_attention_states(
        torch.stack([path.out, block[0]], 1), torch.stack([path.lse, block[1]], 1)
    )
    assert pool.stats == before
    for i, leaf in enumerate(leaves):
        (child,) = pool.fork(leaf)
        pool.write(
            0, pool.append([child], [0] * 8), key[8 * i : 8 * i + 8], value[8 * i : 8 * i + 8]
        )
        own = plan_tree_attention(pool, [child], 8, query_heads=4)
        expected = truth(q[8 * i : 8 * i + 8], pool, own)
        assert_close([x[8 * i : 8 * i + 8].double() for x in merged], expected, 1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_equal_bits_again_and_on_any_number_of_threads(level):
    pool = make_pool(2, 64)
    leaves = level_tree(pool, [2, 4, 32], [200, 90, 31])
    plan = plan_tree_attention(pool, leaves, query_heads=14, chunk=48)
    q = queries(plan, pool)
    with simd_level(level):
        first = tree_attention(q, pool, plan)
        for count in (1, 2, 5):
            with threads(count):
                again = tree_attention(q, pool, plan)
            assert torch.equal(again.out, first.out) and torch.equal(again.lse, first.lse)


def test_cuts_and_refills_change_nothing():
    pool = make_pool(1, 16, 8, torch.float64)
    nodes = random_forest(pool, 5, depth=3, fan_out=3, size=30)
    leaves = leaves_of(pool, nodes)
    plan = plan_tree_attention(pool, leaves, query_heads=2)
    q = queries(plan, pool)
    expected = tree_attention(q, pool, plan)
    for node in nodes:
        if pool.node(node).length > 1:
            pool.split(node, pool.node(node).length // 2)
    pool.check()
    assert_close(tree_attention(q, pool, plan), expected)  # the old plan reads the same places
    again = plan_tree_attention(pool, leaves, query_heads=2)
    assert_close(tree_attention(q, pool, again), expected)
    kept = {n: pool.read(0, pool.slots(n)) for leaf in leaves for n in pool.path(leaf)}
    for node in nodes:
        pool.unpin(node)
    assert pool.evict(10**6) > 0 and pool.stats.used_pages == 0
    with pytest.raises(ValueError, match="was evicted; pin it"):
        tree_attention(q, pool, again)
    refill = pool.pin(leaves)
    pool.layer(0).fill_(torch.nan)
    for node in refill.nodes:
        pool.write(0, pool.slots(node), *kept[node])
    assert_close(
        tree_attention(q, pool, plan_tree_attention(pool, leaves, query_heads=2)), expected
    )


def test_strided_queries_and_another_scale():
    pool = make_pool(2, 16)
    leaves = level_tree(pool, [1, 3], [20, 7])
    plan = plan_tree_attention(pool, leaves, query_heads=4)
    q = queries(plan, pool)
    turned = q.transpose(0, 1).contiguous().transpose(0, 1)
    apart = torch.stack([q, q], -1)[..., 0]
    expected = tree_attention(q, pool, plan, scale=0.5)
    for view in (turned, apart):
        assert not view.is_contiguous()
        assert torch.equal(tree_attention(view, pool, plan, scale=0.5).out, expected.out)
    reference = tree_attention_ref(q, pool, plan, scale=0.5)
    torch.testing.assert_close(expected.out, reference.out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 32])
def test_nan_reaches_the_rows_below_it_alone(heads):
    pool = make_pool(1, 16)
    leaves = level_tree(pool, [1, 4], [20, 7])
    plan = plan_tree_attention(pool, leaves, 3, query_heads=heads, causal=True)
    q = queries(plan, pool)
    clean = tree_attention(q, pool, plan).out
    slot = int(pool.slots(leaves[1])[5])
    for kind in (0, 1):
        held = pool.layer(0)[slot // 16, kind, slot % 16].clone()
        pool.layer(0)[slot // 16, kind, slot % 16] = torch.nan
        found = tree_attention(q, pool, plan).out
        pool.layer(0)[slot // 16, kind, slot % 16] = held
        assert torch.equal(found[[0, 1, 2, 3, *range(6, 12)]], clean[[0, 1, 2, 3, *range(6, 12)]])
        assert bool(found[4:6].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_registered_op_keeps_torchs_rules(dtype):
    pool = make_pool(2, 8, 4, dtype)
    leaves = level_tree(pool, [1, 3], [9, 4])
    plan = plan_tree_attention(pool, leaves, query_heads=4)
    args = (
        queries(plan, pool),
        pool.layer(0),
        plan.packed,
        [*plan.sizes, pool.page, plan.row_tile],
        0.3,
    )
    torch.library.opcheck(raw, args)


def test_layers_share_a_plan():
    pool = make_pool(1, 8, num_layers=2)
    leaves = level_tree(pool, [1, 2], [5, 3])
    plan = plan_tree_attention(pool, leaves, query_heads=1)
    q = queries(plan, pool)
    first, second = (tree_attention(q, pool, plan, layer=i).out for i in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, tree_attention_ref(q, pool, plan, layer=1).out)


def test_a_plan_outlives_other_trees_but_not_its_own():
    pool = make_pool(1, 8)
    mine, other = level_tree(pool, [2], [5])
    plan = plan_tree_attention(pool, [mine], query_heads=1)
    q = queries(plan, pool)
    before = tree_attention(q, pool, plan).out
    pool.release(other)
    extend(pool, pool.alloc(), 20, torch.Generator())
    assert torch.equal(tree_attention(q, pool, plan).out, before)
    pool.advance_epoch()
    with pytest.raises(ValueError, match="belongs to epoch 0"):
        tree_attention(q, pool, plan)
    pool.release(mine)
    with pytest.raises(ValueError, match="was released"):
        tree_attention(q, pool, plan)


def wrong_arguments():
    pool = make_pool(2, 8)
    leaves = level_tree(pool, [1, 2], [5, 3])
    plan = plan_tree_attention(pool, leaves, query_heads=4)
    q = queries(plan, pool)
    gone = pool.alloc()
    pool.release(gone)

    def planned(nodes=leaves, counts=1, heads=4, **options):
        return lambda: plan_tree_attention(pool, nodes, counts, query_heads=heads, **options)

    return [
        (planned(heads=3), ValueError, "query_heads=3 is not a multiple of the pool's 2"),
        (planned(absorb="maybe"), ValueError, "absorb must be one of"),
        (planned(chunk=0), ValueError, "chunk must be at least 1 or None, got 0"),
        (planned(row_tile=0), ValueError, "row_tile must be at least 1 or None"),
        (planned(counts=[1]), ValueError, "one row count for each node"),
        (planned(counts=9, causal=True), ValueError, "has 8 tokens on its path, .* 9 rows"),
        (planned(counts=-1), ValueError, "cannot have -1 rows"),
        (planned(counts=2**31), ValueError, r"more than 2\^31 keys or states; plan fewer rows"),
        (planned([gone]), ValueError, "was released"),
        (lambda: tree_attention(q.double(), pool, plan), TypeError, "q must be float32"),
        (lambda: tree_attention(q[:1], pool, plan), ValueError, r"q must be \[2, 4, 8\]"),
        (lambda: tree_attention(q[:, :2], pool, plan), ValueError, r"got \[2, 2, 8\]"),
        (lambda: tree_attention(q.to("meta"), pool, plan), ValueError, "q lies on meta but"),
        (lambda: tree_attention(q, pool, plan, layer=1), ValueError, "layer 1 of 1 does not"),
        (
            lambda: raw(q, pool.layer(0), plan.packed, [9] * 6 + [16, 4], 1.0),
            ValueError,
            "does not have the sizes",
        ),
    ]


@pytest.mark.parametrize("number", range(len(wrong_arguments())))
def test_wrong_arguments_are_named(number):
    call, error, words = wrong_arguments()[number]
    with pytest.raises(error, match=words):
        call()
