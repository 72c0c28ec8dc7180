"""Times calls beside each other: interleaved, in rotating order, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
Times = dict[str, float]


class Clock(Protocol):
    """Runs a call once and says how long it took, by one or several clocks, in seconds."""

    def __call__(self, call: Call) -> Times: ...


def cpu_clock(call: Call) -> Times:
    """Time of this process on all cores together, and time on the wall."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


class CudaClock:
    """Device events around a call; what the caches hold is overwritten before."""

    def __init__(self, flushed_bytes: int = 256 << 20) -> None:
        self._flushed = torch.empty(flushed_bytes, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call) -> Times:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return {"device": start.elapsed_time(end) / 1e3}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often every call is timed."""

    rounds: int = 9
    """timed calls of each provider"""
    warm_ups: int = 1
    """calls before, not counted: compilation, allocation, choice of algorithms"""
    patience: float = float("inf")
    """seconds after which a provider that is slow has had enough, if it was timed three times"""
    always: tuple[str, ...] = ()
    """providers for whom there is always patience"""
    seconds: float = 0.0
    """goes on beyond the rounds until this much time has passed"""


def interleaved(calls: Mapping[str, Call], clock: Clock, plan: Plan) -> dict[str, list[Times]]:
    """Times of every call, round by round; each round starts with the next call."""
    for call in calls.values():
        for _ in range(plan.warm_ups):
            call()
    times: dict[str, list[Times]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    order, begin, done = list(calls), time.perf_counter(), 0
    while done < plan.rounds or time.perf_counter() - begin < plan.seconds:
        for name in order:
            patience = float("inf") if name in plan.always else plan.patience
            if len(times[name]) >= 3 and spent[name] > patience:
                continue
            start = time.perf_counter()
            times[name].append(clock(calls[name]))
            spent[name] += time.perf_counter() - start
        order = [*order[1:], *order[:1]]
        done += 1
    return times


def summary(times: list[Times]) -> dict[str, Any]:
    """Number of calls; of every clock the least, the median and the 20th and 80th percentile."""
    found: dict[str, Any] = {"calls": len(times)}
    for clock in times[0]:
        seconds = sorted(one[clock] for one in times)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else []
        found[f"{clock}_s"] = {
            "least": seconds[0],
            "median": statistics.median(seconds),
            "p20": fifths[0] if fifths else seconds[0],
            "p80": fifths[3] if fifths else seconds[0],
        }
    return found
