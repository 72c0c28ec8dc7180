"""tree_attention against attention path by path, on trees of decoding and without sharing.

Run: OMP_NUM_THREADS=1 python benches/bench_tree_attention.py [--rounds N] [CASE ...]
     OMP_NUM_THREADS=1 python benches/bench_tree_attention.py --plans
     python -m pytest benches/bench_tree_attention.py --benchmark-enable

    ours     tree_attention: each token of the tree is read once
    paged    the same kernel on a plan that reads every path by itself: paged decoding
    leaves   torch's scaled_dot_product_attention, one call a path, its keys and values already
             copied into a tensor of its own

Levels are nodes x tokens from the root on; one query a leaf. S/U: tokens of all paths over tokens
of the tree. Cells: milliseconds of ours, then the times of paged and leaves relative to it: least
process CPU times, providers in turn in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_fast.benchmark.timing import Plan, cpu_clock, interleaved, summary
from dlm_fast.ops import TreeKVPool, TreePlan, plan_tree_attention, tree_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """(nodes, tokens) of each level, and the heads."""

    levels: tuple[tuple[int, int], ...]
    heads: int = 16
    key_heads: int = 4
    width: int = 128
    rows: int = 1

    def tree(self, dtype: torch.dtype) -> tuple[TreeKVPool, list[int]]:
        pool = TreeKVPool(num_layers=1, key_heads=self.key_heads, width=self.width, dtype=dtype)
        level: list[int] = []
        for count, size in self.levels:
            each = count // len(level) if level else 0
            level = [c for node in level for c in pool.fork(node, each)] or [
                pool.alloc() for _ in range(count)
            ]
            pool.append(level, [0] * (size * count))
        numbers = torch.randn(pool.layer(0).shape, generator=torch.Generator().manual_seed(0))
        pool.layer(0).copy_(numbers)
        return pool, level


def segments(prompt: int, depth: int, length: int) -> tuple[tuple[int, int], ...]:
    """A binary tree of 16 leaves: ``depth`` segments of ``length`` tokens behind a prompt."""
    return ((1, prompt), *((min(2**i, 16), length) for i in range(1, depth + 1)))


CASES: dict[str, Case] = {
    "1x2000, 16x64": Case(((1, 2000), (16, 64))),
    "1x1024, 64x32": Case(((1, 1024), (64, 32))),
    "1x512, 4x64, 16x64, 64x64": Case(((1, 512), (4, 64), (16, 64), (64, 64))),
    "binary, prompt 256, 4 segments of 128": Case(segments(256, 4, 128)),
    "binary, prompt 1024, 8 segments of 128": Case(segments(1024, 8, 128)),
    "binary, prompt 256, 4 of 128, 28 heads on 4": Case(segments(256, 4, 128), 28, 4, 128),
    "binary, prompt 256, 4 of 128, 8 heads of 64": Case(segments(256, 4, 128), 8, 8, 64),
    "binary, prompt 48, 4 of 32, 4 heads of 24": Case(segments(48, 4, 32), 4, 4, 24),
    "1x512, 16x64, blocks of 8 rows": Case(((1, 512), (16, 64)), rows=8),
    "4 trees of 1x512, 4x128": Case(((4, 512), (16, 128))),
    "64x512, no sharing": Case(((64, 512),)),
    "16x2048, no sharing, 8 heads of 64": Case(((16, 2048),), 8, 8, 64),
}
PLAN_TREES = {
    "1024 leaves, 1365 nodes": ((1, 256), (4, 64), (16, 64), (64, 64), (256, 64), (1024, 64)),
    "1024 leaves, 2047 nodes": tuple((2**i, 64) for i in range(11)),
    "64 trees of 16 leaves, 1984 nodes": ((64, 256), *((64 * 2**i, 512) for i in range(1, 5))),
}


def providers(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    pool, leaves = case.tree(dtype)
    generator = torch.Generator().manual_seed(1)
    shape = case.rows * len(leaves), case.heads, case.width
    q = torch.randn(shape, generator=generator).to(dtype)
    paths = []
    for leaf in leaves:
        kv = pool.read(0, pool.path_slots(leaf))
        paths.append([x.transpose(0, 1)[None].contiguous() for x in kv])
    rows = [x.transpose(0, 1)[None] for x in q.split(case.rows)]

    def path_by_path() -> list[Tensor]:
        return [
            F.scaled_dot_product_attention(row, key, value, enable_gqa=True)
            for row, (key, value) in zip(rows, paths, strict=True)
        ]

    def planned(absorb: str) -> TreePlan:
        return plan_tree_attention(pool, leaves, case.rows, query_heads=case.heads, absorb=absorb)

    ours, paged = planned("by_cost"), planned("always")
    return {
        "ours": lambda: tree_attention(q, pool, ours),
        "paged": lambda: tree_attention(q, pool, paged),
        "leaves": path_by_path,
    }


def sharing(case: Case) -> float:
    """S/U."""
    unique = sum(count * size for count, size in case.levels)
    return sum(size for _, size in case.levels) * case.levels[-1][0] / unique


@pytest.mark.parametrize("name", ["ours", "paged", "leaves"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_tree_attention(benchmark, case, dtype, name):
    benchmark.group = f"tree_attention {case} {dtype}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark(providers(CASES[case], DTYPES[dtype])[name])


@pytest.mark.parametrize("tree", PLAN_TREES)
def test_plan(benchmark, tree):
    benchmark.group = "plan_tree_attention"
    pool, leaves = Case(PLAN_TREES[tree], 28, 4, 8).tree(torch.bfloat16)
    benchmark(lambda: plan_tree_attention(pool, leaves, query_heads=28))


def cell(case: Case, dtype: torch.dtype, rounds: int) -> str:
    timed = interleaved(providers(case, dtype), cpu_clock, Plan(rounds=rounds, patience=2))
    times = {name: summary(t)["cpu_s"]["least"] for name, t in timed.items()}
    others = " / ".join(f"{times[name] / times['ours']:.2f}" for name in ("paged", "leaves"))
    return f"{1e3 * times['ours']:.3g}: {others}"


def print_plans(rounds: int) -> None:
    print("| tree | milliseconds of CPU |")
    print("|---|---|")
    for name, levels in PLAN_TREES.items():
        pool, leaves = Case(levels, 28, 4, 8).tree(torch.bfloat16)
        calls = {"plan": lambda p=pool, n=leaves: plan_tree_attention(p, n, query_heads=28)}
        times = summary(interleaved(calls, cpu_clock, Plan(rounds=rounds))["plan"])["cpu_s"]
        print(f"| {name} | {1e3 * times['least']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plans", action="store_true", help="time the plans of large trees")
    args = parser.parse_args()
    if args.plans:
        print_plans(args.rounds)
        return
    print("| tree | S/U | float32 | bfloat16 |")
    print("|---|---|---|---|")
    for name in args.cases or CASES:
        case = CASES[name]
        cells = " | ".join(cell(case, dtype, args.rounds) for dtype in DTYPES.values())
        print(f"| {name} | {sharing(case):.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
