"""Numbers of a run: exact global means over micro-batches and ranks, one JSON line per step."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dlm_fast.algorithms.contract import Largest
from dlm_fast.training.checkpoint import replace_durably
from dlm_fast.training.distributed import Runtime

logger = logging.getLogger(__name__)

Row = dict[str, float]


class MetricSums:
    """Sums and counts of this rank; ``reduce`` makes them means over all ranks."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}
        self._counts: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """One observation of a mean."""
        self._add_pair(name, value * weight, weight)

    def add_values(self, name: str, values: Iterable[float]) -> None:
        """Observations of a mean."""
        found = [float(value) for value in values]
        self._add_pair(name, math.fsum(found), len(found))

    def add_count(self, name: str, value: float) -> None:
        """Summed over ranks, not averaged."""
        self._counts[name] = self._counts.get(name, 0.0) + value

    def add_max(self, name: str, value: float) -> None:
        """The largest over ranks."""
        self._maxima[name] = max(self._maxima.get(name, -math.inf), value)

    def add_reported(self, metrics: Mapping[str, float | tuple[float, float]]) -> None:
        """What an algorithm reports: pairs (sum, count), ``Largest``, or numbers to average."""
        for name, value in metrics.items():
            if isinstance(value, Largest):
                self.add_max(name, value)
            elif isinstance(value, tuple):
                self._add_pair(name, float(value[0]), float(value[1]))
            else:
                self._add_pair(name, float(value), 1.0)

    def _add_pair(self, name: str, total: float, count: float) -> None:
        old_total, old_count = self._means.get(name, (0.0, 0.0))
        self._means[name] = (old_total + total, old_count + count)

    def reduce(self, runtime: Runtime | None) -> Row:
        """name -> global number; a mean of nothing is left out. A collective."""
        merged = MetricSums()
        own = (self._means, self._counts, self._maxima)
        for means, counts, maxima in runtime.gather(own) if runtime else [own]:
            for name, (total, count) in means.items():
                merged._add_pair(name, total, count)
            for name, value in counts.items():
                merged.add_count(name, value)
            for name, value in maxima.items():
                merged.add_max(name, value)
        row = {name: total / count for name, (total, count) in merged._means.items() if count}
        return row | merged._counts | merged._maxima


def add_memory(sums: MetricSums, device: torch.device) -> None:
    """Memory of the largest rank."""
    sums.add_max("memory/rss_gb", _resident_bytes() / 2**30)
    if device.type == "cuda":
        sums.add_max("memory/cuda_gb", torch.cuda.max_memory_allocated(device) / 2**30)


def _resident_bytes() -> float:
    """Memory of this process now, or its peak where the system only tells that."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)


class MetricsFile:
    """``metrics.jsonl``: the source of truth of every plot."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Row) -> None:
        """Appends one line. A full disk costs the line, not the run."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = (json.dumps(finite, allow_nan=False) + "\n").encode()
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(line)
        except OSError as error:
            logger.warning("step %s is missing in %s: %s", row.get("step"), self.path, error)
            if self.path.exists():  # half a line would spoil the next one
                os.truncate(self.path, size)

    def truncate(self, step: int) -> None:
        """Drops the lines after ``step``, which the resumed run writes again."""
        if self.path.exists():
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            replace_durably(self.path, text.encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, in order; a last line cut off by a kill is left out."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: is it the folder of a run?")
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows
