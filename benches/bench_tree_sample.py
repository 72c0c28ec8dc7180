"""Trees of rollouts beside flat rollouts of the same number and length, on the built-in model.

    python benches/bench_tree_sample.py --threads 1
    python benches/bench_tree_sample.py --threads 1 --prompts 2 --leaves 64 --depths 8

End-of-text tokens are never drawn, so all responses have the same length: ``depth`` segments. Both
ways keep keys in a pool (``rollout.cache=tree``) and share the prompt's; a tree shares what comes
behind it too. S: response tokens of all leaves; U: each once. The times are process CPU times: the
smallest of interleaved runs, and the largest in brackets; "x faster" is the ratio of the smallest.
``--kind block`` takes the block-diffusion model. ``--json FILE`` keeps every number.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dlm_fast
from dlm_fast.rollout import SamplerConfig, TreeConfig, sample, sample_trees


def measure(args: argparse.Namespace, policy: dlm_fast.Policy, depth: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, 90, (args.prompt,), generator=generator) for _ in range(args.prompts)
    ]
    length = args.segment * depth
    sizes = {
        "max_new_tokens": length,
        "block_size": args.block,
        "steps": length,
        "temperature": 1.0,
        "forbid_ids": policy.family.eos_ids,
    }
    kept = SamplerConfig(**sizes, cache="tree")
    flat = SamplerConfig(**sizes, cache="block", stop_at_eos=True) if args.kind == "block" else kept
    growth = TreeConfig(
        leaves=args.leaves, segment=args.segment, max_depth=depth, repetition="none"
    )
    rows = [prompt for prompt in prompts for _ in range(args.leaves)]
    ways: dict[str, Callable[[], Any]] = {
        "tree": lambda: sample_trees(policy, prompts, kept, growth, seed=1),
        "flat": lambda: sample(policy, rows, flat, seed=1),
    }
    taken: dict[str, list[float]] = {"tree": [], "flat": []}
    made: dict[str, Any] = {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            begin = time.process_time()
            made[name] = way()
            taken[name].append(time.process_time() - begin)
    assert {t.response_length for t in made["flat"]} == {length}
    flat_tokens = sum(tree.flat_tokens for tree in made["tree"])
    assert flat_tokens == length * len(rows)
    return {
        "depth": depth,
        "leaves": len(rows),
        "flat_tokens": flat_tokens,
        "unique_tokens": sum(tree.unique_tokens for tree in made["tree"]),
        "cpu_s": taken,
    }


def row_of(case: dict[str, Any]) -> str:
    tree, flat = (case["cpu_s"][name] for name in ("tree", "flat"))
    saved = case["flat_tokens"] / case["unique_tokens"]
    cells = [
        str(case["depth"]),
        str(case["flat_tokens"]),
        str(case["unique_tokens"]),
        f"{saved:.2f}",
        f"{min(flat):.2f} ({max(flat):.2f})",
        f"{min(tree):.2f} ({max(tree):.2f})",
        f"{case['leaves'] / min(flat):.1f}",
        f"{case['leaves'] / min(tree):.1f}",
        f"{case['unique_tokens'] / min(tree):.0f}",
        f"{min(flat) / min(tree):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=("causal", "block"), default="causal")
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--leaves", type=int, default=16)
    parser.add_argument("--segment", type=int, default=16)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    block = {"block_size": args.block} if args.kind == "block" else {}
    policy = dlm_fast.load(
        "tiny", kind=args.kind, width=args.width, layers=args.layers, max_length=8192, **block
    )
    cases = [measure(args, policy, depth) for depth in args.depths]
    names = ("segments", "S", "U", "S/U", "flat, s", "tree, s", "flat leaves/s", "tree leaves/s")
    print("| " + " | ".join([*names, "decoded tokens/s", "x faster"]) + " |")
    print("|" + "---|" * 10)
    for case in cases:
        print(row_of(case))
    if args.json:
        machine = {"machine": platform.machine(), "torch": torch.__version__}
        options = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({**machine, "options": options, "cases": cases}, indent=1))


if __name__ == "__main__":
    main()
