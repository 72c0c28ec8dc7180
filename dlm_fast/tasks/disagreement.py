"""Why our verdict on an answer differs from another checker's, where a known reason fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .answer_text import before_end_of_turn, boxes
from .math_numbers import value_in_words, values
from .math_text import clean, without_unit


def why(task: str, completion: str, reference: str, score: Mapping[str, Any]) -> str | None:
    """The reason in words; None where none of those known for the task fits.

    Args:
        task: name of the task
        completion: the text that both have judged
        reference: the right answer
        score: `correct` and `detail` of our verdict, which the other one contradicts
    """
    known = {"gsm8k": MATH_REASONS, "math": MATH_REASONS, "countdown": COUNTDOWN_REASONS}
    detail = score["detail"]
    found = str(detail.get("found") or detail.get("answer") or "")
    text = before_end_of_turn(completion)
    case = _Case(text, found, reference, bool(score["correct"]), str(detail.get("by")))
    return next((words for fits, words in known.get(task, ()) if fits(case)), None)


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

    @property
    def boxes_differ(self) -> bool:
        """Whether the text holds several boxes with different contents."""
        return len({box.content for box in boxes(self.text)}) > 1

    @property
    def has_words(self) -> bool:
        """Whether a unit or other words stand around the answer or the reference."""
        return any(
            without_unit(clean(text)) != clean(text) or value_in_words(text) is not None
            for text in (self.found, self.reference)
        )


Reason = tuple[Callable[[_Case], bool], str]

MATH_REASONS: Sequence[Reason] = (
    (
        lambda case: not case.accepted and case.boxes_differ,
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
        lambda case: case.accepted and case.boxes_differ,
        "boxes that differ: the last one is the answer",
    ),
    (
        lambda case: case.accepted and bool(values(case.found) & values(case.reference)),
        "the same number, written otherwise",
    ),
    (
        lambda case: case.accepted and case.has_words,
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
