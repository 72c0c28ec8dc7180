r"""Shaped rewards for mathematical problems, as published with d1 (Zhao et al., arXiv:2504.12216).

GSM8K   2 right answer + 0.5 answer is an integer + 0.5 strict format + 0.5 soft format
        + up to 0.5 for the four tags, less 0.001 for each character behind the last one
MATH    2 right answer + 0.5 * (answer tags + (1 if boxed else 0.5))

The published test for a box compares with a text that begins with a backspace (an unescaped
backslash), so it never matches there and each answer gets the 0.5. Here the box is really looked
for. All tests are single searches for fixed texts.
"""

from __future__ import annotations

from dataclasses import dataclass

from .answer_text import before_end_of_turn, boxes

CORRECT = 2.0
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
# Published with the line breaks that belong to the tags; one of each is asked for.
_COUNTED = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
_BEHIND = 0.001


@dataclass(frozen=True)
class Shaped:
    """The parts of a shaped reward; their sum is the reward."""

    parts: dict[str, float]

    @property
    def reward(self) -> float:
        """Their sum."""
        return sum(self.parts.values())


def gsm8k(completion: str, answer: str | None, correct: bool) -> Shaped:
    """Parts `correct`, `integer`, `strict_format`, `soft_format`, `tags`."""
    text = before_end_of_turn(completion)
    return Shaped(
        {
            "correct": CORRECT * correct,
            "integer": 0.5 * (answer is not None and answer.strip().isdecimal()),
            "strict_format": 0.5 * _strict(text),
            "soft_format": 0.5 * _soft(text),
            "tags": _tags(text),
        }
    )


def math(completion: str, answer: str | None, correct: bool) -> Shaped:
    """Parts `correct`, `answer_tags`, `boxed`."""
    text = before_end_of_turn(completion)
    opening = text.find("<answer>")
    tagged = opening >= 0 and text.find("</answer>", opening) >= 0
    boxed = next(boxes(text), None) is not None
    return Shaped(
        {"correct": CORRECT * correct, "answer_tags": 0.5 * tagged, "boxed": 0.5 if boxed else 0.25}
    )


def _strict(text: str) -> bool:
    """Each tag on a line of its own, nothing before, between or behind but one line break."""
    text = text.removesuffix("\n")
    middle = text.find("\n</reasoning>\n<answer>\n")
    return (
        text.startswith("<reasoning>\n")
        and middle >= len("<reasoning>")
        and text.endswith("\n</answer>")
        and all(text.count(tag) == 1 for tag in TAGS)
    )


def _soft(text: str) -> bool:
    """The text begins with the tags in order, only white space between reasoning and answer."""
    if not text.lstrip().startswith("<reasoning>"):
        return False
    middle = text.find("</reasoning>")
    rest = text[middle + len("</reasoning>") :].lstrip() if middle >= 0 else ""
    return rest.startswith("<answer>") and "</answer>" in rest


def _tags(text: str) -> float:
    score = sum(0.125 for tag in _COUNTED if text.count(tag) == 1)
    if text.count(_COUNTED[-1]) == 1:
        score -= _BEHIND * len(text.rpartition(_COUNTED[-1])[2].strip())
    return max(score, 0.0)
