"""Writes the tables of docs/math_answers.md: our verdicts beside published ones.

Run: python benches/agreement_tables.py RESPONSES [--print TASK]
RESPONSES is a folder with gsm8k_*.jsonl, math500_*.jsonl and countdown_*.jsonl, or, with --print, a
file of the same shape: question, answer, response, correct_by_...
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dlm_fast import tasks
from dlm_fast.tasks.agreement import compare, markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "math_answers.md"
FILES = {
    "gsm8k": "gsm8k_llada8b_256.jsonl",
    "math": "math500_llada8b_256.jsonl",
    "countdown": "countdown_llada8b_256.jsonl",
}
SECONDS = 20.0


def table(name: str, path: Path) -> str:
    """The comparison of one file; a long limit, so that a busy machine gives the same table."""
    task = tasks.get(name) if name == "countdown" else tasks.get(name, seconds=SECONDS)
    return markdown(compare(task, str(path)))


def render(page: str, responses: Path) -> str:
    """The page with its tables renewed."""
    for name, file in FILES.items():
        start, end = f"<!-- agreement {name} -->", f"<!-- end of agreement {name} -->"
        block = f"{start}\n{table(name, responses / file)}\n{end}"
        page = re.sub(f"{start}.*?{end}", lambda _, block=block: block, page, flags=re.S)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("responses", type=Path)
    parser.add_argument("--print", choices=list(FILES), help="print the table of one file")
    options = parser.parse_args()
    if options.print:
        print(table(options.print, options.responses))
    else:
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), options.responses), "utf-8")


if __name__ == "__main__":
    main()
