"""The protocol of the published numbers: every task, every provider, one JSON file.

Run: python benches/protocol.py --device cpu            (threads 1 and 2, a quarter of an hour)
     python benches/protocol.py --device cuda
Then `python benches/make_tables.py` renews docs/benchmarks.md.

On a CPU each number of threads has a process of its own, pinned to as many cores. Providers are
interleaved in rotating order. Every time stands beside the errors of the same call against
float64. Memory is measured in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> int:
    options = _options()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    if options.device == "cpu" and options.part is None:
        found = _merged(options)
    else:
        found = measure(options)
    _save(options.out, found)
    print(f"saved to {options.out}", flush=True)
    return 0


def _save(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, help="default: benches/results/protocol_DEVICE.json")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU only")
    parser.add_argument("--tasks", nargs="+", help="such as T1 T2; default: all")
    parser.add_argument("--providers", nargs="+", help="names, beside dlm_fast; default: all")
    parser.add_argument("--rounds", type=int, help="timed calls; default: 9, on a GPU 30")
    parser.add_argument(
        "--patience", type=float, help="seconds for a slow provider; default: 4, on a GPU 20"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; no case starts after them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--shrink", action="store_true", help="tiny sizes: tries every path")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # threads of this process
    options = parser.parse_args()
    if options.out is None:
        options.out = HERE / "results" / f"protocol_{options.device}.json"
    if min(options.threads) < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    return options


def _merged(options: argparse.Namespace) -> dict[str, Any]:
    """One process for each number of threads; their cases behind each other."""
    merged: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            part = Path(folder) / f"{threads}.json"
            words = _without(sys.argv[1:], "--out", "--threads")
            command = [sys.executable, __file__, *words, "--out", str(part)]
            command += ["--part", str(threads)]
            subprocess.run(command, check=True)
            found = json.loads(part.read_text())
            if not merged:
                merged = found
            else:
                merged["cases"] += found["cases"]
                merged["rates"] |= found["rates"]
                merged["seconds"] += found["seconds"]
            merged["command"] = _command()
            _save(options.out, merged)
    if options.memory:
        from protocol_memory import add_memory

        # it does not depend on the threads by more than their small buffers
        add_memory([case for case in merged["cases"] if case["threads"] == options.threads[0]])
    return merged


def _command() -> str:
    """As a reader can repeat it: without a folder of this machine."""
    return shlex.join(["python", "benches/protocol.py", *_without(sys.argv[1:], "--out")])


def _without(words: list[str], *options: str) -> list[str]:
    """The words of a command line without these options and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word in options
        if not dropping:
            kept.append(word)
    return kept


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases in this process."""
    threads = options.part or 1
    if options.device == "cpu" and hasattr(os, "sched_setaffinity"):
        # before torch is loaded, so that its threads stay there too
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])
    import torch

    torch.set_num_threads(threads)
    from protocol_cases import LinearCase, cpu_cases, cuda_cases, shrunk
    from protocol_linear import run_linear_case
    from protocol_machine import facts, rates
    from protocol_run import run_head_case
    from providers import all_providers
    from providers.linear_layer import all_linear_providers

    start = time.perf_counter()
    bench = _bench(options, threads)
    cases = cpu_cases(threads) if options.device == "cpu" else cuda_cases()
    if options.tasks:
        cases = [case for case in cases if case.task in options.tasks]
    if options.shrink:
        cases = [shrunk(case) for case in cases]
    found: dict[str, Any] = {
        "device": options.device,
        "command": _command(),
        "seed": options.seed,
        "rounds": bench.plan.rounds,
        **facts(options.device),
        "rates": {str(threads): rates(threads)},
        "providers": _described([*all_providers(options.device), *all_linear_providers()]),
        "cases": [],
        "left_out": [],
        "seconds": 0.0,
    }
    for case in cases:
        if time.perf_counter() - start > options.budget:
            found["left_out"].append(f"{case.task} {case.dtype}: the time was over")
            continue
        begin = time.perf_counter()
        run = run_linear_case if isinstance(case, LinearCase) else run_head_case
        found["cases"].append(run(case, bench))  # type: ignore[arg-type]
        took = time.perf_counter() - begin
        found["seconds"] = round(time.perf_counter() - start, 1)
        _save(options.out, found)  # what is cut short has measured what it has measured
        print(f"{threads} thread(s) {took:6.1f} s  {_title(case)}", flush=True)
    return found


def _described(providers: list[Any]) -> dict[str, dict[str, Any]]:
    """Name -> calls in words, why not here. One name may stand for several calls."""
    found: dict[str, dict[str, Any]] = {}
    for one in providers:
        known = found.setdefault(one.name, {"what": one.what, "unavailable": one.unavailable})
        if known["what"] != one.what:
            known["what"] += f"; T7: {one.what}"
    return found


def _bench(options: argparse.Namespace, threads: int) -> Any:
    from protocol_cases import KEY_PROVIDERS
    from protocol_run import Bench
    from providers import all_providers

    from dlm_fast.benchmark.providers import OURS
    from dlm_fast.benchmark.timing import CudaClock, Plan, cpu_clock

    on_gpu = options.device == "cuda"
    return Bench(
        device=options.device,
        clock=CudaClock() if on_gpu else cpu_clock,
        plan=Plan(
            rounds=options.rounds or (30 if on_gpu else 9),
            # on a CPU the call whose errors are taken has warmed up
            warm_ups=10 if on_gpu else 0,
            always=() if on_gpu else KEY_PROVIDERS,
            patience=options.patience or (20.0 if on_gpu else 4.0),
        ),
        providers=[
            one
            for one in all_providers(options.device)
            if options.providers is None or one.name in (OURS, *options.providers)
        ],
        threads=threads,
        seed=options.seed,
    )


def _title(case: Any) -> str:
    size = getattr(case, "size", None)
    shape = f"{case.samples} x {case.rows}" if size is None else f"N={size.n} V={size.v}"
    return f"{case.task} {case.work} {case.dtype} {shape} {getattr(case, 'variant', '')}"


if __name__ == "__main__":
    sys.exit(main())
