"""Cells and lookups of the benchmark page: times, errors, titles, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Case = dict[str, Any]
Result = dict[str, Any]

ERRORS = {
    "logprob": "logp",
    "lse": "lse",
    "entropy": "entropy",
    "confidence": "confidence",
    "hidden_grad": "dH",
    "weight_grad": "dW",
    "norms": "norms",
}


def error_cells(result: Result, names: Iterable[str]) -> list[str]:
    wrong = result.get("inaccurate", [])
    cells = []
    for name in names:
        error = result["errors"].get(name)
        text = "-" if error is None else f"{error:.1e}"
        cells.append(f"**{text}**" if name in wrong else text)
    return cells


def result_of(case: Case, name: str) -> Result:
    return next((r for r in case["results"] if r["provider"] == name), {"missing": "not asked"})


def seconds_of(found: dict[str, Any], case: Case, result: Result) -> Any:
    """The number that counts: see the page's opening. None where there is none."""
    if "missing" in result or "calls" not in result:
        return None
    if found["device"] == "cuda":
        return result["device_s"]["median"]
    return result["cpu_s"]["least"] if case["threads"] == 1 else result["wall_s"]["median"]


def clock_title(found: dict[str, Any], case: Case) -> str:
    if found["device"] == "cuda":
        return "ms"
    return f"ms, {case['threads']} thread{'s' * (case['threads'] > 1)}"


def shape_of(case: Case) -> str:
    size = case["size"]
    return f"{size['n']} of {size['t']} rows, D={size['d']}, V={size['v']}"


def grouped(cases: list[Case], key: Callable[[Case], Any]) -> list[tuple[Any, list[Case]]]:
    """Cases with the same key, in the order of their first."""
    keys = dict.fromkeys(key(case) for case in cases)
    return [(one, [case for case in cases if key(case) == one]) for one in keys]


def ratio(seconds: Any, own: Any) -> str:
    return "-" if seconds is None or own is None else f"{seconds / own:.2f}"


def ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
