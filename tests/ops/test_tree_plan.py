"""Plans of tree attention: rows by depth first, runs, what is read again, how items are cut."""

from __future__ import annotations

import pytest
import torch
from tree_problems import level_tree, make_pool

from dlm_fast.ops import plan_tree_attention

PARTS = ("items", "slots", "starts", "rows", "limits", "destinations", "places", "indptr")


def parts_of(plan):
    """The packed parts by name; items as rows of eight."""
    items, pieces, rows, destinations, merges, _ = plan.sizes
    lengths = 8 * items, pieces, pieces + 1, rows, rows, destinations, merges, merges + 1
    parts = dict(zip(PARTS, plan.packed.split(lengths), strict=True))
    return {name: part.view(-1, 8).tolist() if name == "items" else part.tolist()
            for name, part in parts.items()}  # fmt: skip


def test_a_plan_of_known_numbers():
    """Root of 6 with children A (2 tokens, a leaf) and B (no token), below B two leaves of 1 and
    3 tokens; pages of 4. Rows are asked for in another order than depth first."""
    pool = make_pool(1, 4, page=4)
    (root,) = level_tree(pool, [1], [6])
    a, b = pool.fork(root, 2)
    b1, b2 = pool.fork(b, 2)
    pool.append([a, b1, b2], [0] * 6, [2, 1, 3])
    plan = plan_tree_attention(pool, [b2, a, b1], [1, 2, 1], query_heads=1, absorb="never")
    assert plan.unique_tokens == plan.read_tokens == 12
    found = parts_of(plan)
    # the order of the children is that of their first rows
    assert found["rows"] == [0, 3, 1, 2]
    assert found["limits"] == [9, 7, 8, 8]
    firsts = [
        int(pool.slots(node)[i]) for node, i in ((root, 0), (root, 4), (b2, 0), (b1, 0), (a, 0))
    ]
    assert found["slots"] == firsts and all(slot % 4 == 0 for slot in firsts)
    assert found["starts"] == [0, 4, 6, 9, 10, 12]
    # first piece, pieces, first row, rows, position, keys, destination, masked; longest first
    assert found["items"] == [
        [0, 2, 0, 4, 0, 6, 0, 0],
        [4, 1, 2, 2, 6, 2, 6, 0],
        [2, 1, 0, 1, 6, 3, 4, 0],
        [3, 1, 1, 1, 6, 1, 5, 0],
    ]
    assert found["destinations"] == [0, 2, 4, 6, 1, 3, 5, 7]
    assert found["places"] == [0, 3, 1, 2] and found["indptr"] == [0, 2, 4, 6, 8]


def test_a_row_with_one_part_goes_to_the_output():
    pool = make_pool(1, 4)
    leaves = level_tree(pool, [3], [5])
    found = parts_of(plan_tree_attention(pool, leaves, query_heads=1))
    assert sorted(found["destinations"]) == [~2, ~1, ~0]
    assert found["places"] == [] and found["indptr"] == [0]


@pytest.mark.parametrize(("length", "apart"), [(28, False), (29, True)])
def test_a_shared_run_is_read_apart_where_that_costs_less(length, apart):
    """d = 128, 16-bit keys, 7 query heads a key head, two rows: from 29 tokens on."""
    pool = make_pool(1, 128, dtype=torch.bfloat16)
    leaves = level_tree(pool, [1, 2], [length, 4])
    plan = plan_tree_attention(pool, leaves, query_heads=7)
    assert plan.unique_tokens == length + 8
    assert plan.read_tokens == plan.unique_tokens + (0 if apart else length)
    assert plan.sizes[0] == (3 if apart else 2)


def test_chains_are_one_run():
    pool = make_pool(1, 4)
    (node,) = level_tree(pool, [1], [5])
    for _ in range(6):
        (node,) = pool.fork(node)
        pool.append([node], [0] * 3)
    plan = plan_tree_attention(pool, [node], query_heads=1)
    assert plan.sizes[0] == 1 and plan.unique_tokens == plan.read_tokens == 23


def test_items_are_balanced_and_end_where_pages_do():
    pool = make_pool(1, 4, page=16)
    (node,) = level_tree(pool, [1], [1000])
    plan = plan_tree_attention(pool, [node], 10, query_heads=1, chunk=300, row_tile=4)
    items = parts_of(plan)["items"]
    keys = sorted({(item[4], item[5]) for item in items})
    assert [position for position, _ in keys] == [0, 256, 512, 752]
    assert all(position % 16 == 0 for position, _ in keys)
    assert sorted({item[3] for item in items}) == [3, 4] and len(items) == 12
    work = [item[3] * item[5] for item in items]
    assert work == sorted(work, reverse=True)


def test_causal_rows_skip_what_they_cannot_see():
    pool = make_pool(1, 4, page=16)
    (node,) = level_tree(pool, [1], [64])
    plan = plan_tree_attention(pool, [node], 64, query_heads=1, chunk=16, row_tile=16, causal=True)
    found = parts_of(plan)
    assert found["limits"] == list(range(1, 65))
    assert len(found["items"]) == 4 + 3 + 2 + 1
    assert sorted(item[2] // 16 - item[4] // 16 for item in found["items"] if item[7]) == [0] * 4


def test_rows_may_belong_to_inner_nodes():
    pool = make_pool(1, 4)
    leaves = level_tree(pool, [1, 2], [40, 8])
    root = pool.path(leaves[0])[0]
    plan = plan_tree_attention(pool, [leaves[1], root, leaves[0], root], query_heads=1)
    # a node's own rows come before those below it
    assert parts_of(plan)["rows"] == [1, 3, 0, 2]


def test_a_thousand_leaves():
    pool = make_pool(1, 4)
    leaves = level_tree(pool, [1, 4, 16, 64, 256, 1024], [1] * 6)
    plan = plan_tree_attention(pool, leaves, query_heads=1, absorb="never")
    assert plan.unique_tokens == plan.read_tokens == 1365
    assert plan.sizes[-1] == 6 * 1024
