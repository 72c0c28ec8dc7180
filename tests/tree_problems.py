"""Random prefix trees in a pool, filled with random keys and values."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from dlm_fast.ops import TreeKVPool, TreePlan, plan_tree_attention, tree_attention_ref


def make_pool(key_heads=2, width=16, page=16, dtype=torch.float32, **options) -> TreeKVPool:
    settings = {"num_layers": 1, "page": page, "dtype": dtype, **options}
    return TreeKVPool(key_heads=key_heads, width=width, **settings)


def extend(pool: TreeKVPool, node: int, count: int, generator: torch.Generator) -> None:
    """``count`` tokens with random keys and values; what is not written is NaN."""
    used = pool.stats.used_pages
    slots = pool.append([node], [0] * count)
    for layer in range(pool.num_layers):
        kv = pool.layer(layer)
        for page in {int(slot) // pool.page for slot in slots}:
            if page >= used:
                kv[page] = torch.nan
        numbers = torch.randn(
            2, count, pool.key_heads, pool.width, generator=generator, dtype=torch.float64
        ).to(pool.device, pool.dtype)
        pool.write(layer, slots, numbers[0], numbers[1])


def level_tree(pool: TreeKVPool, counts: list[int], sizes: list[int], seed: int = 0) -> list[int]:
    """``counts[i]`` nodes of ``sizes[i]`` tokens on level i; the nodes of the last level."""
    generator = torch.Generator().manual_seed(seed)
    level: list[int] = []
    for count, size in zip(counts, sizes, strict=True):
        if level:
            level = [c for node in level for c in pool.fork(node, count // len(level))]
        else:
            level = [pool.alloc() for _ in range(count)]
        for node in level:
            extend(pool, node, size, generator)
    return level


def random_forest(
    pool: TreeKVPool, seed: int, trees: int = 1, depth: int = 3, fan_out: int = 3, size: int = 40
) -> list[int]:
    """Trees of random shape with nodes of 0 to ``size`` tokens; all nodes in depth-first order."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    nodes: list[int] = []

    def grow(node: int, level: int) -> None:
        extend(pool, node, rng.choice([0, 1, size, rng.randint(0, size)]), generator)
        nodes.append(node)
        if level < depth and (level == 0 or rng.random() < 0.8):
            for child in pool.fork(node, rng.randint(1, fan_out)):
                grow(child, level + 1)

    for _ in range(trees):
        grow(pool.alloc(), 0)
    return nodes


def leaves_of(pool: TreeKVPool, nodes: list[int]) -> list[int]:
    return [node for node in nodes if not pool.node(node).children]


def path_length(pool: TreeKVPool, node: int) -> int:
    return pool.node(node).start + pool.node(node).length


def queries(plan: TreePlan, pool: TreeKVPool, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = plan.num_rows, plan.query_heads, pool.width
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(pool.dtype)


def truth(q: Tensor, pool: TreeKVPool, plan: TreePlan) -> list[Tensor]:
    """The definition in float64."""
    return list(tree_attention_ref(q.cpu().double(), pool, plan))


def plans(pool: TreeKVPool, nodes: list[int], row_counts=1, **options) -> list[TreePlan]:
    """Plans that differ in everything that may not change the result."""
    return [
        plan_tree_attention(
            pool, nodes, row_counts, absorb=absorb, chunk=chunk, row_tile=row_tile, **options
        )
        for absorb in ("by_cost", "never", "always")
        for chunk, row_tile in ((None, None), (5, None), (40, 3), (None, 1))
    ]
