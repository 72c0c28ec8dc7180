"""Comparing a task's verdicts with verdicts that a file of answers already has.

A row holds `question`, `answer` (the reference), `response` (a completion) and a verdict in a
column named `correct_by_...`. Each disagreement gets the reason for which ours differs, where one
of the known reasons fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .answer_text import before_end_of_turn, boxes
from .base import Example, Score, Task
from .math_numbers import value_in_words, values
from .math_text import clean, without_unit
from .scoring import score_batch
from .table import Row, read_table, shorten

VERDICT = "correct_by_"
WIDTH = 60


@dataclass(frozen=True)
class Disagreement:
    """One row on which the two verdicts differ."""

    where: str
    """file and line"""
    reference: str
    """the right answer"""
    answer: str
    """what stands in the completion as its final answer, as far as it matters"""
    ours: bool
    """our verdict; theirs is the other one"""
    reason: str | None
    """why the verdicts differ, None where no known reason fits"""


@dataclass(frozen=True)
class Agreement:
    """What came out of a comparison."""

    task: str
    """name of the task"""
    compared: int
    """rows with two verdicts"""
    without_answer: int
    """rows without a reference, which nobody can judge"""
    disagreements: list[Disagreement]
    """rows whose verdicts differ"""

    @property
    def rate(self) -> float:
        """Fraction of the compared rows on which both agree."""
        return 1 - len(self.disagreements) / self.compared

    @property
    def rejected(self) -> list[Disagreement]:
        """What the other checker accepts and ours does not."""
        return [row for row in self.disagreements if not row.ours]


def compare(task: Task, path: str) -> Agreement:
    """Score the responses of a file with a task and compare with the verdicts of the file.

    ValueError names the line of a row that is not of the expected shape.
    """
    rows = read_table(path)
    column = _verdict_column(rows[0])
    judged = [row for row in rows if _cell(row, "answer") is not None]
    if not judged:
        raise ValueError(f"{path}: no row has an answer, so there is nothing to compare")
    responses = [_response(row) for row in judged]
    examples = [_example(task.name, row) for row in judged]
    disagreements = []
    for row, text, example, score in zip(
        judged, responses, examples, score_batch(task, responses, examples), strict=True
    ):
        theirs = _cell(row, column)
        if not isinstance(theirs, bool):
            raise ValueError(f"{row.where}: {column} must be true or false, got {shorten(theirs)}")
        if theirs != score.correct:
            disagreements.append(_disagreement(task.name, row, text, example, score))
    return Agreement(task.name, len(judged), len(rows) - len(judged), disagreements)


def markdown(agreement: Agreement) -> str:
    """The comparison as a table, one line per disagreement, behind a line that sums it up."""
    agreed = agreement.compared - len(agreement.disagreements)
    accepted = len(agreement.disagreements) - len(agreement.rejected)
    summary = (
        f"`{agreement.task}`: {agreed} of {agreement.compared} verdicts agree "
        f"({100 * agreement.rate:.1f} %); {accepted} more are accepted here, "
        f"{len(agreement.rejected)} more are rejected."
    )
    if agreement.without_answer:
        summary += f" {agreement.without_answer} rows have no reference and are left out."
    lines = ["| line | reference | answer | here | why |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.where.rpartition(' ')[2]} | {_code(row.reference)} | {_code(row.answer)} "
        f"| {'right' if row.ours else 'wrong'} | {row.reason or 'no known reason'} |"
        for row in agreement.disagreements
    ]
    return "\n".join([summary, "", *lines]) if agreement.disagreements else summary


def _disagreement(task: str, row: Row, text: str, example: Example, score: Score) -> Disagreement:
    reference = str(example["answer"]) if "answer" in example else str(_cell(row, "answer"))
    text = before_end_of_turn(text)
    found = str(score.detail.get("found") or score.detail.get("answer") or "none")
    known = MATH_REASONS if task in ("gsm8k", "math") else COUNTDOWN_REASONS
    case = _Case(text, found, reference, score.correct, str(score.detail.get("by")))
    reason = next((words for fits, words in known if fits(case)), None)
    return Disagreement(row.where, reference, found, score.correct, reason)


@dataclass(frozen=True)
class _Case:
    text: str
    found: str
    reference: str
    accepted: bool
    by: str

    @property
    def box_is_open(self) -> bool:
        r"""Whether the last \boxed{ is not closed before the line or the answer ends."""
        behind = self.text.rpartition("boxed{")[2] if "boxed{" in self.text else "}"
        line = behind.strip().partition("\n")[0].partition("</")[0]
        return line.count("}") <= line.count("{")


Reason = tuple[Callable[[_Case], bool], str]


def _by_words(case: _Case) -> bool:
    text = clean(case.found)
    return without_unit(text) != text or value_in_words(case.found) is not None


MATH_REASONS: Sequence[Reason] = (
    (
        lambda case: not case.accepted and len({b.content for b in boxes(case.text)}) > 1,
        "boxes that differ: the last one is the answer",
    ),
    (
        lambda case: not case.accepted and bool(values(case.found)),
        "the whole answer counts, not the first number in it; the values differ",
    ),
    (
        lambda case: case.accepted and "," in case.found and len(values(case.found)) == 1,
        "a thousands separator does not end a number",
    ),
    (
        lambda case: case.accepted and case.box_is_open,
        "the box is not closed; its line holds the answer",
    ),
    (
        lambda case: case.accepted and "\\boxed" not in case.text and "boxed{" in case.text,
        "the backslash before boxed is missing",
    ),
    (
        lambda case: case.accepted and len({b.content for b in boxes(case.text)}) > 1,
        "boxes that differ: the last one is the answer",
    ),
    (
        lambda case: case.accepted and bool(values(case.found) & values(case.reference)),
        "the same number, written otherwise",
    ),
    (
        lambda case: case.accepted and (_by_words(case) or _by_words(_swapped(case))),
        "the same but for the unit or the words around it",
    ),
    (
        lambda case: case.accepted and case.by == "number",
        "the same numbers in a list whose order does not count",
    ),
    (
        lambda case: case.accepted and case.by == "text",
        "the same but for LaTeX's layout or a name in front of it",
    ),
    (
        lambda case: case.accepted and case.by == "symbolic",
        "equal as expressions, by math-verify",
    ),
)
COUNTDOWN_REASONS: Sequence[Reason] = (
    (
        lambda case: case.accepted and case.box_is_open,
        "the box is not closed; its line holds the expression",
    ),
)


def _swapped(case: _Case) -> _Case:
    return _Case(case.text, case.reference, case.found, case.accepted, case.by)


def _verdict_column(row: Row) -> str:
    columns = [column for column in row.values if column.startswith(VERDICT)]
    if len(columns) != 1:
        raise ValueError(
            f"{row.where}: a file of judged responses needs one column {VERDICT}..., got "
            f"{', '.join(columns) or 'none'}"
        )
    return columns[0]


def _cell(row: Row, column: str) -> Any:
    if column not in row.values:
        raise ValueError(f"{row.where}: no column {column!r} in a file of judged responses")
    return row.values[column]


def _response(row: Row) -> str:
    response = _cell(row, "response")
    if not isinstance(response, str):
        raise ValueError(f"{row.where}: response must be a text, got {shorten(response)}")
    return response


def _example(task: str, row: Row) -> dict[str, Any]:
    answer = _cell(row, "answer")
    if task == "countdown":
        try:
            numbers, target = answer
        except (TypeError, ValueError):
            raise ValueError(
                f"{row.where}: a countdown answer is [numbers, target], got {shorten(answer)}"
            ) from None
        return {"numbers": numbers, "target": target}
    if isinstance(answer, float) and answer == int(answer):
        answer = int(answer)
    return {"question": str(_cell(row, "question")), "answer": str(answer)}


def _code(text: str) -> str:
    shown = " ".join(text.split())
    shown = shown if len(shown) <= WIDTH else shown[: WIDTH - 3] + "..."
    return "`" + shown.replace("|", "\\|").replace("`", "'") + "`"
