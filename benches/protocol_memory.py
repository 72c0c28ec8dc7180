"""Adds to measured cases what memory each provider needs, in fresh processes side by side."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dlm_fast.benchmark.memory import extra_bytes


def add_memory(cases: list[dict[str, Any]]) -> None:
    """Of cases that ask for it; nothing is timed meanwhile."""
    jobs = [
        (case, result)
        for case in cases
        if case.get("memory")
        for result in case["results"]
        if "missing" not in result
    ]

    def measure(job: tuple[dict[str, Any], dict[str, Any]]) -> None:
        case, result = job
        result["extra_bytes"] = extra_bytes(
            "providers:memory_calls",
            name=result["provider"],
            work=case["work"],
            size=[case["size"][letter] for letter in "tndv"],
            dtype=case["dtype"],
            threads=case["threads"],
        )

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(measure, jobs))
