r"""The final answer of a completion to a mathematical problem.

Models mark it with \boxed{}, with answer tags or, as GSM8K's solutions do, behind ####. Marks are
looked for in this order. A number at the end of the text is the last resort, off by default: a
completion that ran out of tokens ends in some number too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .answer_text import before_end_of_turn, boxes, tagged_answer

HASHES = "####"
# Where the last number is looked for, and how long a marked answer may be.
TAIL = 2000
MAX_ANSWER = 1000

# Digits run up to the bound of the tail, each of them read by one branch: nothing to backtrack.
_EMPTY_BOX = re.compile(r"\\?boxed ?\{[ ._?\\]*\}(?:\s*</answer\}?)?")
_NUMBER = re.compile(r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:\\?%)?")


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Which marks of a final answer count."""

    boxed: bool
    answer_tags: bool
    hashes: bool
    last_number: bool


@dataclass(frozen=True)
class Found:
    """A final answer."""

    text: str
    """as it stands in the completion, at most `MAX_ANSWER` characters"""
    mark: str
    """"boxed", "answer_tag", "hashes" or "last_number"
    """


def final_answer(completion: str, marks: Marks) -> Found | None:
    r"""The answer that a completion marks as final; None without one, or for one too long.

    The last box counts. One that the end of the text cuts off counts where no whole one stands
    before it.

    >>> every = Marks(boxed=True, answer_tags=True, hashes=True, last_number=True)
    >>> final_answer(r"\boxed{2}. No: <answer>\boxed{3}</answer>", every)
    Found(text='3', mark='boxed')
    >>> final_answer("3 * 4 = 12 eggs\n#### 12", every)
    Found(text='12', mark='hashes')
    """
    text = before_end_of_turn(completion)
    found = _marked(text, marks)
    return None if found is None or len(found.text) > MAX_ANSWER else found


def _marked(text: str, marks: Marks) -> Found | None:
    if marks.boxed and (content := _boxed(text)) is not None:
        return Found(content, "boxed")
    if marks.answer_tags and (tagged := tagged_answer(text)):
        without = _EMPTY_BOX.sub("", tagged).strip()
        if without:
            return Found(without, "answer_tag")
    if marks.hashes and HASHES in text:
        behind = text.rpartition(HASHES)[2].strip().partition("\n")[0].strip()
        if behind:
            return Found(behind, "hashes")
    if marks.last_number:
        numbers = _NUMBER.findall(text[-TAIL:])
        if numbers:
            return Found(numbers[-1].rstrip(","), "last_number")
    return None


def _boxed(text: str) -> str | None:
    found = list(boxes(text))
    whole = next((box.content for box in found if not box.cut), None)
    if found and (not found[0].cut or whole is None):
        return found[0].content
    return whole
