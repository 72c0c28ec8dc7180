"""Scoring parts of a batch in threads while the rest of it is still being decoded.

A task says with `thread_safe = True` that `score` and `score_many` may run in several threads at
once. Any other task is scored in the caller's thread, whole, when the batch is complete: a user's
function may rely on that, as one that uses signals or sees the whole batch does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .base import BatchTask, Example, Score
from .scoring import report_failures, score_part


class ScoreStream:
    """Verdicts on completions that come one part after the other.

    Use it in a `with` block; the verdicts equal those of `score_batch` on the whole, in the order
    of the completions' numbers, however the parts were cut and whichever was done first.
    """

    def __init__(self, task: Any, *, threads: int) -> None:
        """`threads`: how many score at once; 0 scores all at the end, in the caller's thread."""
        self._task = task
        self._pool: ThreadPoolExecutor | None = None
        if threads and getattr(task, "thread_safe", False):
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dlm_fast-score")
        self._given: dict[int, tuple[str, Example]] = {}
        self._running: dict[Future[list[Score]], list[int]] = {}
        self._scores: dict[int, Score] = {}
        self.waited_s = 0.0
        """seconds that `finish` took: what scoring added to the time of decoding"""

    def __enter__(self) -> ScoreStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            # an error on the way out must not wait for verdicts that nobody will read
            self._pool.shutdown(wait=False, cancel_futures=True)

    def add(
        self, numbers: Sequence[int], completions: Sequence[str], examples: Sequence[Example]
    ) -> None:
        """Completions with their numbers in the batch; returns at once where there are threads."""
        part = list(zip(numbers, completions, examples, strict=True))
        if self._pool is None:
            self._given |= {number: (text, example) for number, text, example in part}
            return
        # a task of batches spreads a part over its own workers; of any other, each is a job
        jobs = [part] if isinstance(self._task, BatchTask) else [[one] for one in part]
        for job in jobs:
            texts, asked = [text for _, text, _ in job], [example for *_, example in job]
            future = self._pool.submit(score_part, self._task, texts, asked)
            self._running[future] = [number for number, *_ in job]

    def ready(self) -> dict[int, Score]:
        """Verdicts that have come since the last call, by number; waits for none."""
        found: dict[int, Score] = {}
        for future in [future for future in self._running if future.done()]:
            found |= zip(self._running.pop(future), future.result(), strict=True)
        self._scores |= found
        return found

    def finish(self) -> list[Score]:
        """All verdicts in the order of the numbers; failures of the checker are logged."""
        started = time.monotonic()
        numbers = sorted(self._given)
        pairs = [self._given.pop(number) for number in numbers]
        scores = score_part(self._task, [t for t, _ in pairs], [e for _, e in pairs])
        self._scores |= zip(numbers, scores, strict=True)
        for future, its_numbers in self._running.items():
            self._scores |= zip(its_numbers, future.result(), strict=True)
        self._running.clear()
        ordered = [self._scores[number] for number in sorted(self._scores)]
        report_failures(self._task, ordered)
        self.waited_s = time.monotonic() - started
        return ordered
