"""The table of ``dlm-fast bench token_logprob``: our head ops beside plain torch, one head."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dlm_fast.cli.output import table

if TYPE_CHECKING:
    from dlm_fast.benchmark.problem import HeadSize

# work -> (title, providers in the order of the table, op behind each of ours)
WORKS = {
    "score": (
        "log-probabilities, no gradient",
        {
            "dlm_fast": "token_logprob",
            "eager, gather first": "",
            "eager, all positions": "",
        },
    ),
    "gradients": (
        "value and fresh gradients",
        {
            "dlm_fast": "weighted_logprob",
            "dlm_fast, token_logprob": "token_logprob, then backward",
            "eager, gather first": "",
            "eager, all positions": "",
        },
    ),
    "weighted_step": (
        "value and gradients, the head's added to a float32 sum",
        {
            "dlm_fast": "weighted_logprob_",
            "eager, gather first": "",
            "eager, all positions": "",
        },
    ),
}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class HeadTableOptions:
    """One head, both types, all works."""

    size: HeadSize
    """rows, selected rows, width, columns"""
    dtypes: tuple[str, ...] = DTYPES
    """types of hidden states and weights"""
    seconds: float | None = None
    """time for each work and type; None: nine calls of each provider"""
    seed: int = 0
    """seed of the inputs"""
    memory: bool = True
    """also measure memory, each provider in a process of its own"""


def measure(options: HeadTableOptions) -> dict[str, Any]:
    """Everything the table shows; needs torch and the compiled part alone."""
    import torch

    from dlm_fast import _C

    threads = torch.get_num_threads()
    peaks = {
        dtype: _C.fma_peak(dtype == "bfloat16", 0.4, threads) for dtype in ("float32", "bfloat16")
    }
    if peaks["bfloat16"]["peak"] == 0:  # then bfloat16 is multiplied as float32
        peaks["bfloat16"] = peaks["float32"]
    results = [found for dtype in options.dtypes for found in _measure_dtype(options, dtype)]
    if options.memory:
        _add_memory(results, options, threads)
    return {
        "size": asdict(options.size),
        "threads": threads,
        "gflops": peaks,
        "results": results,
    }


def _measure_dtype(options: HeadTableOptions, dtype: str) -> list[dict[str, Any]]:
    import torch

    from dlm_fast.benchmark.problem import make_head
    from dlm_fast.benchmark.timing import Plan, cpu_clock, interleaved, summary
    from dlm_fast.benchmark.truth import truth_of
    from dlm_fast.benchmark.works import (
        FLOP_PER_NDV,
        bound,
        checked,
        main_grad_of,
        plain_provider,
    )

    head = make_head(options.size, getattr(torch, dtype), seed=options.seed)
    truth = truth_of(head)
    plan = Plan(rounds=9) if options.seconds is None else Plan(rounds=3, seconds=options.seconds)
    found = []
    for work, (_, names) in WORKS.items():
        main_grad = main_grad_of(head, work)
        calls = {name: bound(plain_provider(name), work, head, main_grad) for name in names}
        wrong = {name: checked(call, truth, main_grad) for name, call in calls.items()}
        times = interleaved(calls, cpu_clock, plan)
        head.clear()
        found += [
            {
                "dtype": dtype,
                "work": work,
                "provider": name,
                "flop": FLOP_PER_NDV[work] * options.size.ndv,
                "errors": wrong[name],
                **summary(times[name]),
            }
            for name in names
        ]
    return found


def _add_memory(results: list[dict[str, Any]], options: HeadTableOptions, threads: int) -> None:
    """New processes side by side, as many as there are cores: nothing is timed in them."""
    from dlm_fast.benchmark.memory import extra_bytes

    def measure_one(result: dict[str, Any]) -> None:
        result["extra_bytes"] = extra_bytes(
            "dlm_fast.benchmark.works:plain_memory_calls",
            name=result["provider"],
            work=result["work"],
            size=list(asdict(options.size).values()),
            dtype=result["dtype"],
            threads=threads,
        )

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(measure_one, results))


def seconds_of(result: dict[str, Any], threads: int) -> float:
    """The least time: of the processor for one thread, on the wall for several."""
    return float(result["cpu_s" if threads == 1 else "wall_s"]["least"])


def report(measured: dict[str, Any]) -> str:
    """The table and what its columns mean."""
    threads, size = measured["threads"], measured["size"]
    rows: list[list[str]] = []
    for dtype in dict.fromkeys(result["dtype"] for result in measured["results"]):
        peak = measured["gflops"][dtype]["peak"]
        for work, (title, ops) in WORKS.items():
            rows.append([f"{dtype}: {title}", *[""] * 6])
            chosen = [r for r in measured["results"] if (r["dtype"], r["work"]) == (dtype, work)]
            best = seconds_of(chosen[0], threads)
            for result in chosen:
                seconds = seconds_of(result, threads)
                rate = result["flop"] / seconds * 1e-9
                extra = result.get("extra_bytes")
                op = ops[result["provider"]]
                rows.append(
                    [
                        f"  dlm_fast {op}" if op else f"  {result['provider']}",
                        f"{seconds * 1e3:.1f}",
                        "" if result is chosen[0] else f"{seconds / best:.2f}",
                        f"{rate:.0f}",
                        f"{rate / peak:.0%}",
                        f"{result['errors']['logprob']:.1e}",
                        "-" if extra is None else f"{extra / 1e6:.1f}",
                    ]
                )
    header = ("", "ms", "ratio", "GFLOP/s", "of peak", "error of logp", "extra MB")
    tiles = ", ".join(
        f"{dtype} {rate['peak']:.0f} (our register tile {rate['tile']:.0f}, "
        f"{rate['tile'] / rate['peak']:.0%})"
        for dtype, rate in measured["gflops"].items()
    )
    calls = min(result["calls"] for result in measured["results"])
    clock = "processor time" if threads == 1 else "time on the wall"
    notes = (
        f"ms: least {clock} of {calls} or more interleaved calls; ratio: to the first line above",
        "GFLOP/s: useful arithmetic, 2NDV flop, with gradients 6NDV",
        f"of peak: of multiply-adds measured in this run: {tiles}",
        "error of logp: the largest, against float64",
        "extra MB: peak memory of a fresh process beyond inputs and results",
    )
    title = (
        f"{size['n']} of {size['t']} rows selected, width {size['d']}, {size['v']} columns, "
        f"{threads} thread{'s' * (threads > 1)}"
    )
    return "\n".join([title, "", table(header, rows), "", *notes])
