"""interval_attention on packed traces against dense attention by torch: time, memory, errors.

Run: OMP_WAIT_POLICY=PASSIVE python benches/trace_attention.py [--out FOLDER] [--rounds N]
         [--threads 1 2]
Then `python benches/make_tables.py` renews docs/benchmarks.md.

Packs are those of training: recorded responses of 2.28 tokens a step in blocks of 4 behind a prompt
of 150 tokens. *dense* is one ``scaled_dot_product_attention`` under a [T, T] mask, made beforehand.
Errors are those of values and gradients against float64; memory is the peak of a fresh
process beyond inputs and results.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_interval_attention import Case, provider, work
from protocol_machine import facts
from torch import Tensor
from trace_layouts import recorded_steps

from dlm_fast.benchmark.memory import extra_bytes
from dlm_fast.benchmark.timing import Plan, cpu_clock, interleaved, summary
from dlm_fast.ops import (
    TraceNode,
    Visibility,
    interval_attention_ref,
    trace_pack,
)

PROMPT, BLOCK, TOKENS_PER_STEP, SEED = 150, 4, 2.28, 0
HEADS, KEY_HEADS, WIDTH = 8, 4, 64
PACKS = {
    "one response": (1, (1024, 2048, 4096, 8192)),
    "four responses behind one prompt": (4, (4096,)),
}
"""responses, and about how many rows"""
WORKS = {"forward": False, "forward and backward": True}
RIVALS = ("ours", "dense")
NUMBERS = ("out", "dq", "dk", "dv")


@functools.lru_cache(maxsize=1)
def visibility(rows: int, responses: int) -> Visibility:
    """Of a pack of about this many rows."""
    generator = torch.Generator().manual_seed(SEED)
    length = round((rows - PROMPT) / responses / (1 + BLOCK / TOKENS_PER_STEP))
    nodes = [TraceNode(parent=-1, ids=torch.arange(PROMPT))]
    for _ in range(responses):
        steps = round(length / TOKENS_PER_STEP)
        step = recorded_steps(PROMPT, length, BLOCK, steps, generator)
        nodes.append(TraceNode(parent=0, ids=torch.arange(length), step=step))
    return trace_pack(nodes, block_size=BLOCK, mask_id=0).visibility


def case(rows: int, responses: int) -> Case:
    return Case(visibility(rows, responses), HEADS, KEY_HEADS, WIDTH)


def errors(chosen: Case) -> dict[str, dict[str, list[float]]]:
    """Of both, against float64, a key head with its query heads at a time: largest absolute error
    and relative (Frobenius) one."""
    tensors = chosen.tensors(torch.float32)
    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(SEED))
    found: dict[str, list[Tensor]] = {}
    for name in RIVALS:
        out = provider(name, chosen)(*tensors)
        out = out if out.dim() == 3 else out[0].transpose(0, 1)  # torch's call has heads first
        found[name] = [out.detach(), *torch.autograd.grad(out, tensors, upstream)]
    exact: list[list[Tensor]] = [[], [], [], []]
    group = HEADS // KEY_HEADS
    for head in range(KEY_HEADS):
        own = slice(head * group, (head + 1) * group)
        leaves = [
            x[:, p].detach().double().requires_grad_()
            for x, p in zip(tensors, (own, *[slice(head, head + 1)] * 2), strict=True)
        ]
        truth = interval_attention_ref(*leaves, chosen.visibility)
        gradients = torch.autograd.grad(truth, leaves, upstream[:, own].double())
        for parts, part in zip(exact, (truth.detach(), *gradients), strict=True):
            parts.append(part)
    return {
        name: {
            key: [float((a - b).abs().max()), float((a - b).norm() / b.norm())]
            for key, a, b in zip(NUMBERS, ours, [torch.cat(p, 1) for p in exact], strict=True)
        }
        for name, ours in found.items()
    }


def memory_calls(
    rows: int, responses: int, name: str
) -> tuple[Callable[[], object], Callable[[], Any]]:
    """Forward and backward, for a fresh process; dense attention makes its mask inside."""
    torch.set_num_threads(1)
    chosen = case(rows, responses)
    tensors = chosen.tensors(torch.float32)

    def call(chosen: Case, tensors: list[Tensor]) -> list[Tensor]:
        attend = provider(name, chosen)
        out = attend(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, out.detach())]

    small = Case(Visibility.causal([64]), HEADS, KEY_HEADS, WIDTH)
    few = small.tensors(torch.float32)
    return lambda: call(small, few), lambda: call(chosen, tensors)


def measure(rounds: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for title, (responses, sizes) in PACKS.items():
        for rows in sizes:
            chosen = case(rows, responses)
            one: dict[str, Any] = {"pack": title, "rows": chosen.visibility.num_queries}
            if rows <= 4096:  # float64 scores of longer ones need many GB
                one["errors"] = errors(chosen)
            one["extra_bytes"] = {
                name: extra_bytes(
                    "trace_attention:memory_calls", rows=rows, responses=responses, name=name
                )
                for name in RIVALS
            }
            one["times"] = [
                {"threads": count, "work": title_of, "provider": name, **times}
                for count in threads
                for title_of, train in WORKS.items()
                for name, times in timed(chosen, train, rounds, count).items()
            ]
            found.append(one)
            print(json.dumps(one), flush=True)
    return found


def timed(chosen: Case, train: bool, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(threads)
    calls = {name: work(name, chosen, torch.float32, train) for name in RIVALS}
    times = interleaved(calls, cpu_clock, Plan(rounds=rounds, patience=4))
    return {name: summary(own) for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON file")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    result = {
        "what": "seconds and bytes of attention over packed traces, float32",
        "command": "python benches/trace_attention.py --threads "
        + " ".join(map(str, arguments.threads)),
        "heads": [HEADS, KEY_HEADS, WIDTH],
        "seed": SEED,
        "rounds": arguments.rounds,
        **facts("cpu"),
        "cases": measure(arguments.rounds, arguments.threads),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "trace_attention.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
