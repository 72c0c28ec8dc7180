"""Attention over prefix trees on a CUDA device: equal to the definition, on every plan."""

from __future__ import annotations

import pytest
import torch
from tree_problems import leaves_of, level_tree, make_pool, path_length, plans, random_forest

from dlm_fast.ops import merge_attention_states, plan_tree_attention, tree_attention
from dlm_fast.ops import tree_attention_ref as definition

pytestmark = pytest.mark.cuda
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def check(pool, plan):
    generator = torch.Generator().manual_seed(1)
    shape = plan.num_rows, plan.query_heads, pool.width
    q = torch.randn(shape, generator=generator).to(pool.device, pool.dtype)
    found, right = tree_attention(q, pool, plan), definition(q.double(), pool, plan)
    torch.testing.assert_close(found.out.double(), right.out, rtol=0, atol=TOLERANCE[pool.dtype])
    torch.testing.assert_close(found.lse.double(), right.lse, rtol=0, atol=1e-5)
    again = tree_attention(q, pool, plan)
    assert torch.equal(again.out, found.out) and torch.equal(again.lse, found.lse)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [24, 64, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (40, 1)])
def test_levels(device, heads, width, dtype):
    pool = make_pool(heads[1], width, dtype=dtype, device=device)
    leaves = level_tree(pool, [1, 4, 64], [700, 33, 17])
    for plan in plans(pool, leaves, query_heads=heads[0]):
        check(pool, plan)


@pytest.mark.parametrize("seed", range(8))
def test_random_forests(device, seed):
    layout = ("token", "head")[seed % 2]
    pool = make_pool(2, 64, (4, 16, 64)[seed % 3], device=device, layout=layout)
    nodes = random_forest(pool, seed, 3, 4, 3, 200)
    counts = [min(1 + seed % 3, path_length(pool, node)) for node in nodes]
    for plan in plans(pool, nodes, counts, query_heads=6, causal=True):
        check(pool, plan)
    check(pool, plan_tree_attention(pool, leaves_of(pool, nodes), query_heads=6))


def test_merge(device):
    o, lse = torch.randn(4, 7, 3, 40), torch.randn(4, 7, 3)
    lse[0, :3] = lse[1] = -torch.inf
    found = merge_attention_states(o.to(device), lse.to(device))
    torch.testing.assert_close([x.cpu() for x in found], list(merge_attention_states(o, lse)))
