"""Scoring batches: failures of a checker are counted and reported, never silently zero."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .base import BatchTask, Example, Score, Task

log = logging.getLogger(__name__)

GIVE_UP_AFTER = 8
"""a checker that fails on each of so many completions is broken"""


class CheckerError(RuntimeError):
    """A checker that fails on everything is broken; a run must not learn from its zeros."""


@dataclass(frozen=True)
class ScoringReport:
    """What came out of scoring a batch."""

    count: int
    """number of completions"""
    reward: float
    """mean reward"""
    correct: float
    """fraction solved"""
    checker_errors: int
    """completions on which the checker itself failed; they count as reward 0"""
    first_error: str | None
    """the first failure, for a log"""

    @classmethod
    def of(cls, scores: Sequence[Score]) -> ScoringReport:
        """Summarise scores; an empty batch has mean 0."""
        errors = [s.detail["checker_error"] for s in scores if "checker_error" in s.detail]
        count = len(scores)
        return cls(
            count=count,
            reward=sum(score.reward for score in scores) / max(count, 1),
            correct=sum(score.correct for score in scores) / max(count, 1),
            checker_errors=len(errors),
            first_error=errors[0] if errors else None,
        )


def score_batch(
    task: Task,
    completions: Sequence[str],
    examples: Sequence[Example],
    *,
    give_up_after: int = GIVE_UP_AFTER,
) -> list[Score]:
    """Score each completion against its example.

    Where the checker raises, the completion gets reward 0 and `detail["checker_error"]`, and the
    failure is logged; `ScoringReport.of(scores)` counts them. When `give_up_after` completions or
    more were given and the checker failed on all of them, `CheckerError` is raised.
    """
    if len(completions) != len(examples):
        raise ValueError(f"{len(completions)} completions for {len(examples)} examples")
    for completion in completions:
        if not isinstance(completion, str):
            raise TypeError(f"completions must be texts, got {type(completion).__name__}")
    scores = score_part(task, completions, examples)
    report = report_failures(task, scores)
    if report.checker_errors == report.count >= give_up_after:
        raise CheckerError(_complaint(task, report.checker_errors, report.count, report))
    return scores


def score_part(task: Task, completions: Sequence[str], examples: Sequence[Example]) -> list[Score]:
    """Verdicts on part of a batch, failures of the checker among them; nothing is logged."""
    scores = _whole_batch(task, completions, examples)
    if scores is not None:
        return scores
    return [
        _guarded(task.score, completion, example)
        for completion, example in zip(completions, examples, strict=True)
    ]


def report_failures(task: Task, scores: Sequence[Score]) -> ScoringReport:
    """The report on a batch; logs how often the checker failed on it, if it did."""
    report = ScoringReport.of(scores)
    if report.checker_errors:
        log.warning(
            "the checker of task %s failed on %d of %d completions, first: %s",
            task.name, report.checker_errors, report.count, report.first_error,
        )  # fmt: skip
    return report


def refuse_broken_checker(
    task: Task, failures: float, count: float, limit: float, scores: Sequence[Score] = ()
) -> None:
    """Raise CheckerError if the checker failed on more than this share of the completions.

    On all of eight or more it is broken whatever the limit. `failures` and `count` may be sums over
    processes; `scores` are those at hand, to name the first failure.
    """
    if count and (failures > limit * count or failures == count >= GIVE_UP_AFTER):
        raise CheckerError(_complaint(task, int(failures), int(count), ScoringReport.of(scores)))


def _complaint(task: Task, failures: int, count: int, report: ScoringReport) -> str:
    share = f"all {count}" if failures == count else f"{failures} of {count}"
    first = f", first with {report.first_error}" if report.first_error else ""
    return (
        f"the checker of task {task.name} failed on {share} completions{first}; mend the checker "
        "or the data"
    )


def _whole_batch(
    task: Task, completions: Sequence[str], examples: Sequence[Example]
) -> list[Score] | None:
    if not completions or not isinstance(task, BatchTask):
        return None
    try:
        return task.score_many(completions, examples)
    except (Exception, SystemExit) as error:
        # One completion may have broken the whole call: the caller goes on one by one, which
        # counts whatever still fails.
        log.warning(
            "the checker of task %s failed on a batch of %d (%r); scoring one by one",
            task.name, len(completions), error,
        )  # fmt: skip
        return None


def _guarded(score: Callable[[str, Example], Score], completion: str, example: Example) -> Score:
    try:
        return score(completion, example)
    except (Exception, SystemExit) as error:  # a checker that calls exit() must not end the run
        return Score(0.0, False, {"checker_error": f"{type(error).__name__}: {error}"})
