"""Decoding with kept keys and values beside recomputing them, on the built-in model.

    python benches/bench_cached_decoding.py --groups 4 --members 16 --prompt 150 --window 256
    python benches/bench_cached_decoding.py --kind full --block 16 --window 64

All ways decode the same prompts with the same draws. For each the table has the tokens that went
through the network (prompts included), the forwards of all rows together, pages of the cache at
their peak, and the process CPU time: the smallest and the largest of interleaved runs; "x less" is
the ratio to recomputing within this run. ``same`` is the share of rows with the ids that
recomputing gives: a block cache is exact, prefix and dual caches are not. ``--json FILE`` keeps
every number.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dlm_fast
from dlm_fast.ops import TokenStats
from dlm_fast.rollout import SamplerConfig, Trajectory, sampler
from dlm_fast.rollout.cached_network import CachedNetwork


@dataclass
class Way:
    """One setting of the sampler, and what its runs took."""

    options: dict[str, Any]
    tokens: int = 0
    forwards: int = 0
    pages: int = 0
    cpu_s: list[float] = field(default_factory=list)
    same: float = 0.0


WAYS = {
    "block": {
        "recompute": {},
        "block, commit by itself": {"cache": "block", "fused_commit": False},
        "block": {"cache": "block"},
    },
    "full": {
        "recompute": {},
        "prefix": {"cache": "prefix"},
        "prefix, horizon 16": {"cache": "prefix", "prefix_horizon": 16},
        "dual": {"cache": "dual"},
    },
}


_networks: list[CachedNetwork] = []


class _Noting(CachedNetwork):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        _networks.append(self)


def decode(
    policy: dlm_fast.Policy, prompts: list[Tensor], way: Way, sizes: dict[str, Any], batch: int
) -> list[Trajectory]:
    way.tokens = way.forwards = 0

    def forward(input_ids: Tensor, *args: Any, **options: Any) -> TokenStats:
        way.tokens += input_ids.numel()
        way.forwards += 1
        return policy.stats(input_ids, *args, **options)

    config = SamplerConfig(**sizes, **way.options)
    begin = time.process_time()
    made = dlm_fast.sample(policy, prompts, config, seed=1, max_batch=batch, forward=forward)
    way.cpu_s.append(time.process_time() - begin)
    if _networks:
        way.pages = _networks.pop().pages.peak
    return made


def run(args: argparse.Namespace) -> dict[str, Way]:
    block = {"block_size": args.block} if args.kind == "block" else {}
    policy = dlm_fast.load(
        "tiny", kind=args.kind, width=args.width, layers=args.layers, max_length=8192, **block
    )
    with torch.no_grad():
        policy.lm_head.weight *= 8.0  # confidences like a trained network's: some high, some low
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, 90, (args.prompt,), generator=generator) for _ in range(args.groups)
    ]
    rows = [prompt for prompt in prompts for _ in range(args.members)]
    sizes = {
        "max_new_tokens": args.window,
        "block_size": args.block,
        "steps": args.window,
        "temperature": 1.0,
        "rule": "dynamic",
        "bound": args.bound,
    }
    # every block takes at least the scheduled one token a step, and more where the model is sure
    sampler.CachedNetwork = _Noting  # type: ignore[misc]
    ways = {name: Way(options) for name, options in WAYS[args.kind].items()}
    for _ in range(args.repeats):
        exact: list[Trajectory] = []
        for way in ways.values():
            made = decode(policy, rows, way, sizes, args.batch)
            exact = exact or made
            equal = [a.response_ids.equal(b.response_ids) for a, b in zip(made, exact, strict=True)]
            way.same = sum(equal) / len(equal)
    return ways


def report(args: argparse.Namespace, ways: dict[str, Way]) -> None:
    base = next(iter(ways.values()))
    print(
        f"{args.groups} prompts of {args.prompt} tokens, {args.members} rollouts each of "
        f"{args.window} tokens in blocks of {args.block}, up to {args.batch} rows a forward; width "
        f"{args.width}, {args.layers} layers; {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{'':24} {'tokens':>10} {'x less':>7} {'forwards':>8} {'pages':>6} "
        f"{'CPU s min':>9} {'max':>7} {'x less':>7} {'same':>6}"
    )
    for name, way in ways.items():
        fewer, faster = base.tokens / way.tokens, min(base.cpu_s) / min(way.cpu_s)
        print(
            f"{name:24} {way.tokens:10d} {fewer:7.2f} {way.forwards:8d} {way.pages:6d} "
            f"{min(way.cpu_s):9.2f} {max(way.cpu_s):7.2f} {faster:7.2f} {way.same:6.1%}"
        )
    if args.json:
        options = {k: v for k, v in vars(args).items() if k != "json"}
        rows = {name: asdict(way) for name, way in ways.items()}
        args.json.write_text(json.dumps({"options": options, "ways": rows}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=sorted(WAYS), default="block")
    parser.add_argument("--groups", type=int, default=4, help="different prompts")
    parser.add_argument("--members", type=int, default=16, help="rollouts of each prompt")
    parser.add_argument("--prompt", type=int, default=150, help="tokens of a prompt")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--bound", type=float, default=0.9, help="of the rule dynamic")
    parser.add_argument("--batch", type=int, default=64, help="most rows in one forward")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    report(args, run(args))


if __name__ == "__main__":
    main()
