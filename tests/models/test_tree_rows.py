"""Tests of forwards whose paths lie in a pool of keys."""

from typing import Any

import pytest
import torch

import dlm_fast
from dlm_fast.models.tree_rows import TreeRows
from dlm_fast.ops import TreeKVPool, tree_attention_ref
from dlm_fast.ops.visibility import Visibility


def grown(**options: Any) -> tuple[TreeKVPool, list[int], torch.Tensor]:
    """A root of three tokens with two children, and room for two more tokens in each."""
    pool = TreeKVPool(num_layers=2, key_heads=1, width=8, page=4, **options)
    root = pool.alloc([5, 6, 7])
    children = pool.fork(root, 2)
    return pool, [root, *children], pool.append(children, [1, 2, 3, 4])


def rows_of(pool: TreeKVPool, nodes: list[int], slots: torch.Tensor, **changes: Any) -> TreeRows:
    options = {"query_heads": 2, "write_rows": torch.arange(4), "write_slots": slots, **changes}
    return TreeRows.of(pool, nodes[1:], [2, 2], **options)


def test_rows_write_their_keys_and_see_their_paths() -> None:
    torch.manual_seed(0)
    pool, nodes, slots = grown()
    pool.write(1, pool.slots(nodes[0]), torch.randn(3, 1, 8), torch.randn(3, 1, 8))
    rows = rows_of(pool, nodes, slots)
    assert rows.position_ids.tolist() == [3, 4, 3, 4] and rows.pred.tolist() == [-1, 0, -1, 2]
    query, key, value = torch.randn(2, 4, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    out_HTd = rows.attend(1, query, key, value)
    assert torch.equal(pool.read(1, slots)[0], key.transpose(0, 1))
    expected = tree_attention_ref(query.transpose(0, 1), pool, rows.plan, layer=1).out
    torch.testing.assert_close(out_HTd, expected.transpose(0, 1))


def test_rows_that_only_predict_write_nothing() -> None:
    pool, nodes, slots = grown()
    for layer in range(2):
        pool.write(layer, torch.cat([pool.slots(nodes[0]), slots]), *torch.ones(2, 7, 1, 8))
    none = torch.empty(0, dtype=torch.int64)
    rows = rows_of(pool, nodes, slots, write_rows=none, write_slots=none)
    rows.attend(0, torch.randn(2, 4, 8), torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))
    assert bool((pool.read(0, slots)[0] == 1).all())


def test_a_policy_sees_a_tree_as_its_paths() -> None:
    policy = dlm_fast.load("tiny", kind="causal", width=16, layers=2, heads=2, kv_heads=1)
    pool, nodes, slots = grown()
    rows_R = torch.arange(3, dtype=torch.int32)
    root = TreeRows.of(
        pool,
        nodes[:1],
        [3],
        query_heads=2,
        write_rows=torch.arange(3),
        write_slots=pool.slots(nodes[0]),
    )
    policy.stats(torch.tensor([5, 6, 7]), root, rows=rows_R)
    new = torch.tensor([1, 2, 3, 4])
    rows_T = torch.arange(4, dtype=torch.int32)
    found = policy.stats(new, rows_of(pool, nodes, slots), rows=rows_T)
    whole = torch.tensor([5, 6, 7, 1, 2, 5, 6, 7, 3, 4])
    at = torch.tensor([3, 4, 8, 9], dtype=torch.int32)
    expected = policy.stats(whole, Visibility.causal([5, 5]), rows=at)
    assert torch.equal(found.token, expected.token)
    torch.testing.assert_close(found.lse, expected.lse)
    with pytest.raises(ValueError, match=r"the cached forward has \[4\] new rows"):
        policy.stats(new[:3], rows_of(pool, nodes, slots), rows=rows_T)
    with pytest.raises(ValueError, match="carry no gradient"):
        policy.logits(new, rows_of(pool, nodes, slots))


def test_the_pool_lies_where_the_model_lies() -> None:
    pool, nodes, slots = grown()
    with pytest.raises(ValueError, match="the pool of keys lies on cpu, the model on meta"):
        rows_of(pool, nodes, slots).to("meta")
