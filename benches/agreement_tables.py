"""Writes the tables of docs/math_answers.md: our verdicts beside published ones.

Run: python benches/agreement_tables.py RESPONSES
RESPONSES is a folder with gsm8k_*.jsonl, math500_*.jsonl and countdown_*.jsonl. For one file of the
same shape: dlm-fast evaluate --task gsm8k --responses FILE
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from dlm_fast.cli.evaluate import EvaluateOptions
from dlm_fast.cli.evaluate_responses import score_responses

PAGE = Path(__file__).resolve().parent.parent / "docs" / "math_answers.md"
FILES = {
    "gsm8k": "gsm8k_llada8b_256.jsonl",
    "math": "math500_llada8b_256.jsonl",
    "countdown": "countdown_llada8b_256.jsonl",
}
WIDTH = 60


def agreement(name: str, responses: Path, **task_options: Any) -> dict[str, Any]:
    """How our verdicts agree with those of a file."""
    if name != "countdown":
        # A long limit, so that a busy machine gives the same table.
        task_options = {"seconds": 20.0} | task_options
    path = str(responses / FILES[name])
    options = EvaluateOptions(task=name, task_options=task_options, responses=path)
    return score_responses(options)["agreement"]


def table(found: dict[str, Any]) -> str:
    """A line that sums the comparison up, and one per disagreement."""
    cases = found["disagreements"]
    accepted = sum(case["ours"] > case["theirs"] for case in cases)
    lines = [
        f"{found['agree']} of {found['rows']} verdicts agree ({100 * found['fraction']:.1f} %); "
        f"{accepted} more are accepted here, {len(cases) - accepted} more are rejected.",
        "",
        "| line | reference | answer | here | why |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        line = case["where"].rpartition(" ")[2]
        verdict = "right" if case["ours"] else "wrong"
        cells = _code(case["reference"]), _code(case["found"])
        lines.append(f"| {line} | {cells[0]} | {cells[1]} | {verdict} | {case['reason']} |")
    return "\n".join(lines)


def render(page: str, responses: Path) -> str:
    """The page with its tables renewed."""
    for name in FILES:
        start, end = f"<!-- agreement {name} -->", f"<!-- end of agreement {name} -->"
        block = f"{start}\n{table(agreement(name, responses))}\n{end}"
        page = re.sub(f"{start}.*?{end}", lambda _, block=block: block, page, flags=re.S)
    return page


def _code(text: str) -> str:
    shown = " ".join(text.split())
    shown = shown if len(shown) <= WIDTH else shown[: WIDTH - 3] + "..."
    return "`" + shown.replace("|", "\\|").replace("`", "'") + "`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("responses", type=Path)
    options = parser.parse_args()
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), options.responses), "utf-8")


if __name__ == "__main__":
    main()
