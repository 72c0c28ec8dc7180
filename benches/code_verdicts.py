"""Time of code verdicts: trivial snippets, scored as a training batch is.

Run: python benches/code_verdicts.py [--count N] [--out FOLDER]

Each verdict is right (half of the snippets pass) and starts new processes: for functions one with
the snippet and one with the tests, for programs one per test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import dlm_fast
from dlm_fast import tasks
from dlm_fast.tasks.sandbox.verdicts import working_mode

FUNCTIONS = {"question": "Double x.", "tests": ["assert f(2) == 4", "assert f(0) == 0"]}
PROGRAMS = {"question": "Double x.", "tests": [{"input": "2", "output": "4"}]}
ANSWERS = {
    "functions": (FUNCTIONS, "def f(x):\n    return 2 * x", "def f(x):\n    return x"),
    "programs": (PROGRAMS, "print(2 * int(input()))", "print(input())"),
}


def measure(kind: str, count: int) -> dict[str, Any]:
    example, right, wrong = ANSWERS[kind]
    completions = [f"```python\n{(right, wrong)[i % 2]}\n```" for i in range(count)]
    task = tasks.get("code")
    tasks.score_batch(task, completions[:2], [example] * 2)  # finds the isolation
    begun = time.perf_counter()
    scores = tasks.score_batch(task, completions, [example] * count)
    seconds = time.perf_counter() - begun
    assert [score.correct for score in scores] == [i % 2 == 0 for i in range(count)]
    return {"kind": kind, "verdicts": count, "seconds": seconds, "per_second": count / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON file")
    parser.add_argument("--count", type=int, default=200, help="verdicts of each kind")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = [measure(kind, arguments.count) for kind in ANSWERS]
    for row in rows:
        print(row)
    result = {
        "what": "wall-clock seconds of scoring a batch",
        "isolation": working_mode(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "versions": {"dlm_fast": dlm_fast.__version__, "python": platform.python_version()},
        "machine": {"system": platform.system(), "processor": platform.machine()},
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "code_verdicts.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
