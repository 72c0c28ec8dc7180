"""Runs one case on a language-model head: everybody's errors, times and memory.

Letters: ``N`` selected rows, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from protocol_cases import HeadCase
from providers.packages import UNIT_WEIGHTS
from torch import Tensor

from dlm_fast.benchmark import works
from dlm_fast.benchmark.problem import Head, HeadSize, make_head
from dlm_fast.benchmark.providers import OURS, Delivered, Provider
from dlm_fast.benchmark.timing import Clock, Plan, interleaved, summary
from dlm_fast.benchmark.truth import Truth, draw_errors, truth_of

# of these an error ten times ours is marked; a wrong token near a tie is no inaccuracy
COMPARED = ("logprob", "lse", "entropy", "confidence", "hidden_grad", "weight_grad", "norms")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how everything is measured."""

    device: str
    clock: Clock
    plan: Plan
    providers: list[Provider]
    threads: int
    seed: int


def run_head_case(case: HeadCase, bench: Bench) -> dict[str, Any]:
    _forget_compiled(case.size, case.dtype)
    head, truth = _problem(
        dataclasses.replace(case.size, t=case.size.t * case.samples, n=case.size.n * case.samples),
        case.dtype,
        case.data,
        (bench.device, bench.seed),
    )
    unit = dataclasses.replace(head, row_weight=torch.ones_like(head.row_weight))
    unit_truth: Truth | None = None
    main_grad = works.main_grad_of(head, case.work)
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Delivered]] = {}
    for provider in bench.providers:
        if case.providers is not None and provider.name not in case.providers:
            continue
        if (reason := provider.why_not(case.work)) is not None:
            results[provider.name] = {"missing": reason}
            continue
        mark = provider.marks.get(case.work)
        if mark == UNIT_WEIGHTS and unit_truth is None:
            unit_truth = truth_of(unit)
        chosen, right = (unit, unit_truth) if mark == UNIT_WEIGHTS else (head, truth)
        assert right is not None
        call = call_of(provider, case, chosen, main_grad)
        try:
            if case.temperature > 0:
                wrong = draw_errors(chosen, right, call())
            else:
                wrong = works.checked(call, right, main_grad)
        except Exception as error:  # a rival's failure is a result, not ours to repair
            if provider.name == OURS and bench.device == "cpu":
                raise
            results[provider.name] = {"missing": f"failed: {type(error).__name__}: {error}"[:300]}
            continue
        calls[provider.name] = call
        results[provider.name] = {"errors": wrong, **({"mark": mark} if mark else {})}
        if case.memory and bench.device == "cuda":
            results[provider.name] |= _device_memory(call)
    head.clear()
    plan = bench.plan
    if case.task not in ("T1", "T1+", "T2", "T3"):
        plan = dataclasses.replace(plan, always=())
    for name, times in interleaved(calls, bench.clock, plan).items():
        results[name] |= summary(times)
    mark_inaccurate(results)
    found = {
        **{name: value for name, value in asdict(case).items() if name not in ("providers",)},
        "threads": bench.threads,
        "flop": works.FLOP_PER_NDV[case.work] * case.size.ndv * case.samples,
        "results": [{"provider": name, **result} for name, result in results.items()],
    }
    if case.task == "T2" or (bench.device == "cuda" and case.samples == 1):
        found["own_gemm_s"] = own_gemms(head, bench)
    return found


@functools.lru_cache(maxsize=1)
def _forget_compiled(size: HeadSize, dtype: str) -> None:
    """Compiled code is of one shape and type, and there is a limit to how much of it is kept."""
    torch._dynamo.reset()


@functools.lru_cache(maxsize=1)
def _problem(
    size: HeadSize, dtype: str, data: str, device_and_seed: tuple[str, int]
) -> tuple[Head, Truth]:
    """Kept for the next task: float64 takes longer than what is measured."""
    device, seed = device_and_seed
    head = make_head(size, getattr(torch, dtype), seed=seed, device=device, flat=data == "flat")
    return head, truth_of(head)


def call_of(
    provider: Provider, case: HeadCase, head: Head, main_grad: Tensor | None
) -> Callable[[], Delivered]:
    """The call that is timed; of several samples: one micro-step after the other."""
    if case.samples == 1:
        return works.bound(provider, case.work, head, main_grad, case.temperature)
    steps = [works.bound(provider, case.work, part, main_grad) for part in parts(head, case)]

    def all_steps() -> Delivered:
        delivered = [step() for step in steps]
        if "logprob" not in delivered[0]:
            return {}
        return {"logprob": torch.cat([one["logprob"] for one in delivered])}

    return all_steps


def parts(head: Head, case: HeadCase) -> list[Head]:
    """Samples of equally many selected rows, each with the hidden states that lie between."""
    found = []
    for index in range(case.samples):
        chosen = slice(index * case.size.n, (index + 1) * case.size.n)
        rows = head.rows[chosen]
        first, last = int(rows[0]), int(rows[-1])
        hidden = head.hidden.detach()[first : last + 1].clone().requires_grad_()
        size = HeadSize(len(hidden), len(rows), head.size.d, head.size.v)
        found.append(
            Head(
                size,
                hidden,
                head.weight,
                head.targets[chosen],
                rows - first,
                head.row_weight[chosen],
            )
        )
    return found


def mark_inaccurate(results: dict[str, dict[str, Any]]) -> None:
    """Names what a provider gets ten times less exact than we do."""
    ours = results.get(OURS, {}).get("errors", {})
    for result in results.values():
        wrong = [
            name
            for name, error in result.get("errors", {}).items()
            if name in COMPARED and error >= 10 * ours.get(name, float("inf"))
        ]
        if wrong:
            result["inaccurate"] = wrong


def _device_memory(call: Callable[[], Delivered]) -> dict[str, int]:
    """After a first call, which has chosen algorithms: peak beyond what was there and is made."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = sum(tensor.nbytes for tensor in call().values())
    torch.cuda.synchronize()
    return {
        "extra_bytes": max(0, torch.cuda.max_memory_allocated() - before - made),
        "reserved_bytes": torch.cuda.memory_reserved(),
    }


@torch.no_grad()
def own_gemms(head: Head, bench: Bench) -> dict[str, Any]:
    """Torch's three matrix products of the step alone: logits, hidden gradient, head gradient.

    On a GPU sums are float32, as ours are, and the third adds to a float32 buffer.
    """
    hidden_ND, weight_VD = head.hidden[head.rows].detach(), head.weight.detach()
    grad_NV = torch.randn(head.size.n, head.size.v, device=bench.device).to(weight_VD.dtype)
    wide = bench.device == "cuda" and weight_VD.dtype != torch.float32
    main = torch.zeros(weight_VD.shape, device=bench.device, dtype=torch.float32)
    if not wide and weight_VD.dtype != torch.float32:
        main = main.to(weight_VD.dtype)  # the CPU's product has no wider result
    options: dict[str, Any] = {"out_dtype": torch.float32} if wide else {}
    calls = {
        "logits": lambda: torch.mm(hidden_ND, weight_VD.T, **options),
        "hidden_grad": lambda: torch.mm(grad_NV, weight_VD, **options),
        "weight_grad": lambda: torch.addmm(main, grad_NV.T, hidden_ND, out=main, **options),
    }
    plan = dataclasses.replace(bench.plan, rounds=min(5, bench.plan.rounds))
    times = interleaved(calls, bench.clock, plan)
    return {name: summary(one) for name, one in times.items()}
