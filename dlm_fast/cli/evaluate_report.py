"""The result of an evaluation as tables for people."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 120


def report(summary: dict[str, Any]) -> str:
    """Title, table of numbers, and where the answers are."""
    title = f"{summary['examples']} examples of {summary['data']}"
    if summary["samples"] != 1:
        title = f"{title}, {summary['samples']:g} answers each"
    parts = [title, _drawn(_numbers(summary))]
    if "agreement" in summary:
        parts.append(_agreement(summary["agreement"]))
    if "answers" in summary:
        # outside the table, which would break a long path into lines
        parts.append(f"every answer  {summary['answers']}")
    return "\n".join(parts)


def _numbers(summary: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("")
    for name in ("correct", "reward"):
        low, high = summary[f"{name}_interval"]
        table.add_row(name, f"{summary[name]:.3f}", f"95 %: {low:.3f} to {high:.3f}, bootstrap")
    for name, value in summary.items():
        if name.startswith(("pass@", "maj@")):
            table.add_row(name, f"{value:.3f}")
    if summary["answered"] < 1:
        table.add_row("answer found", f"{summary['answered']:.3f}", "the others have no vote")
    if summary["checker_failures"]:
        failed = "answers on which the checker failed; counted as wrong"
        table.add_row("checker failures", str(summary["checker_failures"]), failed)
    for name, value in summary.get("prompts", {}).items():
        if value:
            table.add_row(f"prompts {name}", str(value), "longer than the limit")
    if "forwards" in summary:
        table.add_row("length", f"{summary['response_tokens']:.1f}", "tokens up to the end of text")
        table.add_row("forwards", f"{summary['forwards']:.1f}", "network evaluations per answer")
        table.add_row("tokens per step", f"{summary['tokens_per_step']:.2f}")
    if "tokens_per_second" in summary:
        waited = f"{summary['seconds']:.1f} s, of these {summary['score_wait_s']:.1f} s scoring"
        table.add_row("tokens/s", f"{summary['tokens_per_second']:.0f}", waited)
    for name, value in summary["metrics"].items():
        table.add_row(name.replace("_", " "), f"{value:.3f}")
    return table


def _agreement(found: dict[str, Any]) -> str:
    lines = [
        f"{found['agree']} of {found['rows']} verdicts agree with {found['column']} "
        f"({found['fraction']:.4f}); mean {found['compared']} {found['ours']:.4f}, theirs "
        f"{found['theirs']:.4f}"
    ]
    if not found["disagreements"]:
        return lines[0]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("where", "ours", "theirs", "answer", "reference", "why ours"):
        table.add_column(name, overflow="fold")
    for case in found["disagreements"]:
        place = case["where"].rpartition(", ")[2]
        numbers = (f"{case[name]:g}" for name in ("ours", "theirs"))
        answer = "" if case["answer"] is None else str(case["answer"])
        table.add_row(place, *numbers, answer[:80], case["reference"], case["reason"])
    return "\n".join([*lines, _drawn(table)])


def _drawn(table: Table) -> str:
    # cells hold text of models and files: never markup
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, markup=False, highlight=False, emoji=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
