"""interval_attention against dense attention by torch, on the patterns of packed training.

Run: OMP_NUM_THREADS=1 python benches/bench_interval_attention.py [--rounds N] [CASE ...]
     OMP_NUM_THREADS=1 python benches/bench_interval_attention.py --segments
     python -m pytest benches/bench_interval_attention.py --benchmark-enable

    ours       interval_attention
    segments   one torch call for all segments of one length, under their own mask: what a policy
               does without our kernel; where a pattern has no segments, as dense
    dense      one torch call under a [Tq, Tk] mask

All take float32 and bfloat16 as a policy hands them over: [1, heads, rows, width] views of packed
rows. Cells: milliseconds of ours, then the times of segments and dense relative to it: least
process CPU times, providers in turn in one process.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_fast.benchmark.timing import Plan, cpu_clock, interleaved, summary
from dlm_fast.ops import Visibility, interval_attention
from dlm_fast.ops.segment_attention import bucket_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Shape and pattern: query rows, keys, query heads, key heads, width."""

    visibility: Visibility
    heads: int = 8
    key_heads: int = 8
    width: int = 64

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        rows = self.visibility.num_queries, self.visibility.num_keys, self.visibility.num_keys
        heads = self.heads, self.key_heads, self.key_heads
        return [
            torch.randn(t, h, self.width, generator=generator).to(dtype).requires_grad_()
            for t, h in zip(rows, heads, strict=True)
        ]


def free(intervals: Tensor, num_queries: int) -> Visibility:
    position_ids = torch.arange(num_queries)
    pred = torch.full((num_queries,), -1, dtype=torch.int32)
    return Visibility(intervals=intervals.to(torch.int32), position_ids=position_ids, pred=pred)


def trace(prompt: int, response: int, block: int, rounds: int) -> Visibility:
    """A response replayed: its clean stream, then per block and round a noisy chunk."""
    clean = prompt + response
    first_block, blocks = prompt // block, clean // block
    total = clean + (blocks - first_block) * rounds * block
    rows = []
    for b in range(blocks):
        later = clean + max(b + 1 - first_block, 0) * rounds * block
        rows += [[b * block, clean, later, total]] * block
    for start in range(clean, total, block):
        rows += [[start, start + block, 0, 0]] * block
    return free(torch.tensor(rows), total)


def decode(rows: int, keys: int) -> Visibility:
    """The last rows of a sequence, which see all of it: cached decoding of a block."""
    return free(torch.tensor([[0, rows, 0, 0]] * keys), rows)


RAGGED = [731, 402, 655, 288, 519, 830, 347, 324]
CASES: dict[str, Callable[[], Case]] = {
    "full, one length": lambda: Case(Visibility.full([512] * 8)),
    "full, ragged": lambda: Case(Visibility.full(RAGGED)),
    "full, one sequence": lambda: Case(Visibility.full([64])),
    "full, ragged, short": lambda: Case(Visibility.full(list(range(30, 94))), 4, 4, 24),
    "full, one length, short": lambda: Case(Visibility.full([33] * 128), 4, 4, 24),
    "causal, ragged": lambda: Case(Visibility.causal(RAGGED)),
    "causal, one length": lambda: Case(Visibility.causal([512] * 8)),
    "block-causal of 4, ragged": lambda: Case(Visibility.block_causal(RAGGED, 4)),
    "block-causal of 32, one length": lambda: Case(Visibility.block_causal([512] * 8, 32)),
    "decode, 32 of 2000": lambda: Case(decode(32, 2000)),
    "decode, 32 of 2000, grouped": lambda: Case(decode(32, 2000), 16, 4, 128),
    "decode, 4 of 2000, grouped": lambda: Case(decode(4, 2000), 16, 4, 128),
    "clean and noisy, 4096 rows": lambda: Case(trace(512, 512, 32, 6), 8, 4, 64),
    "clean and noisy, blocks of 4": lambda: Case(trace(512, 896, 4, 3), 8, 4, 64),
}


def folded(x_THd: Tensor) -> Tensor:
    return x_THd.transpose(0, 1)[None]


def provider(name: str, case: Case) -> Callable[..., Tensor]:
    visibility = case.visibility
    if name == "ours":
        return lambda q, k, v: interval_attention(q, k, v, visibility)
    if name == "segments" and visibility.buckets:
        return lambda q, k, v: bucket_attention(folded(q), folded(k), folded(v), visibility)
    mask = visibility.dense()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = folded(q), folded(k), folded(v)
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)

    return dense


def work(name: str, case: Case, dtype: torch.dtype, train: bool) -> Callable[[], object]:
    attend, tensors = provider(name, case), case.tensors(dtype)
    if not train:
        detached = [x.detach() for x in tensors]
        return lambda: attend(*detached)

    def step() -> object:
        out = attend(*tensors)
        return torch.autograd.grad(out, tensors, out.detach())

    return step


PROVIDERS = ("ours", "segments", "dense")


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_interval_attention(benchmark, case, dtype, train, name):
    step = "forward and backward" if train else "forward"
    benchmark.group = f"interval_attention {case} {dtype} {step}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark(work(name, CASES[case](), DTYPES[dtype], train))


def ratios(case: Case, dtype: torch.dtype, train: bool, rounds: int, rivals: Sequence[str]) -> str:
    """Milliseconds of ours, and the times of the others relative to it."""
    works = {p: work(p, case, dtype, train) for p in ("ours", *rivals)}
    timed = interleaved(works, cpu_clock, Plan(rounds=rounds, patience=1))
    times = {p: summary(t)["cpu_s"]["least"] for p, t in timed.items()}
    others = " / ".join(f"{times[p] / times['ours']:.2f}" for p in rivals)
    return f"{1e3 * times['ours']:.3g}: {others}"


def line(name: str, case: Case, rounds: int, rivals: Sequence[str]) -> None:
    cells = [ratios(case, d, t, rounds, rivals) for d in DTYPES.values() for t in (False, True)]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--segments", action="store_true", help="4096 rows in equal segments")
    args = parser.parse_args()
    print("| case | float32 forward | and backward | bfloat16 forward | and backward |")
    print("|---|---|---|---|---|")
    if args.segments:
        for length, width in itertools.product((16, 33, 64, 100, 128, 200), (24, 64)):
            case = Case(Visibility.full([length] * (4096 // length)), 4, 4, width)
            line(f"{length} rows, width {width}", case, args.rounds, PROVIDERS[1:2])
        return
    for name in args.cases or CASES:
        line(name, CASES[name](), args.rounds, PROVIDERS[1:])


if __name__ == "__main__":
    main()
