"""Finding the answer inside a completion: tags, boxes, ends of turn.

A completion is hostile text: each function is one bounded pass of string searches, without any
pattern that could backtrack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OPENING_TAG = "<answer>"
CLOSING_TAG = "</answer>"
BOX = "\\boxed{"

# What the families' tokenizers end a turn with. Decoded completions carry none of them;
# completions stored by other programs often do.
END_OF_TURN = ("<|eot_id|>", "<|endoftext|>", "<|im_end|>")

# An inequality x<y is no tag.
TAG_STARTS = ("</", "<answer", "<reasoning", "<|")

MAX_TAGS = 8
MAX_BOX = 4096


def before_end_of_turn(text: str) -> str:
    """The text up to the first end-of-turn token.

    >>> before_end_of_turn("4<|eot_id|><|endoftext|>")
    '4'
    """
    return text[: _first(text, *END_OF_TURN)]


def tagged_answer(text: str) -> str | None:
    """The content of the last answer tag that holds anything; None without a tag.

    An answer that is never closed reaches to the end of the text. Empty tags give "" unless an
    earlier one holds something; only the last `MAX_TAGS` tags are looked at.

    >>> tagged_answer("<answer>1</answer> better: <answer> 2 </answer> done")
    '2'
    """
    parts = text.rsplit(OPENING_TAG, MAX_TAGS)[1:]
    if not parts:
        return None
    contents = (part.partition(CLOSING_TAG)[0].strip() for part in reversed(parts))
    return next(filter(None, contents), "")


def after_closing_tag(text: str) -> str:
    """What follows the last closing answer tag, "" without one."""
    return text.rpartition(CLOSING_TAG)[2].strip() if CLOSING_TAG in text else ""


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...}, with nested braces; None without a box.

    Models cut off or misspell the closing brace: such a box ends at the first line break or angle
    bracket.

    >>> last_box(r"so \boxed{\frac{1}{2}} it is"), last_box(r"so \boxed{1 + 2></answer>")
    ('\\frac{1}{2}', '1 + 2')
    """
    start = text.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    end = closing_brace(text, start)
    if end is not None:
        return text[start:end].strip()
    content = text[start : start + MAX_BOX]
    return content[: _first(content, "\n", "<", ">")].strip()


@dataclass(frozen=True)
class Box:
    r"""What stands in a \boxed{...}."""

    content: str
    """without white space around it"""
    cut: bool
    """whether the text ends inside the box, so that its content may be a part of what was meant"""


def boxes(text: str) -> Iterator[Box]:
    r"""The last boxes of a text, the very last one first, at most `MAX_TAGS`; empty ones left out.

    Reads what models write: a lost backslash, \fbox, white space before the brace, a brace closed
    behind the end of the answer or not at all. A box is never longer than its line where its brace
    is not closed on it, nor does it hold a tag.

    >>> [box.content for box in boxes(r"\boxed{1} or boxed{\frac{1}{2}} or \fbox{3</answer>")]
    ['3', '\\frac{1}{2}', '1']
    """
    end = len(text)
    for _ in range(MAX_TAGS):
        start = max(text.rfind("boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return
        end = start
        opening = text[start : start + 40].partition("{")[0]
        if opening.strip() not in ("boxed", "\\fbox") or len(opening) == 40:
            continue
        content, cut = _box(text, start + len(opening) + 1)
        if content.strip(" ._?\\"):
            yield Box(content, cut)


def _box(text: str, start: int) -> tuple[str, bool]:
    close = closing_brace(text, start)
    content = text[start : start + MAX_BOX if close is None else close]
    tag = _first(content, *TAG_STARTS)
    if tag is None and close is not None:
        return content.strip(), False
    line = content.lstrip()
    line = line[: _first(line, "\n", *TAG_STARTS)]
    cut = tag is None and "\n" not in content and len(content) == len(text) - start
    return line.strip(), cut


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace is closed that was opened before `start`; None if not in `MAX_BOX` signs."""
    depth = 1
    for at, character in enumerate(text[start : start + MAX_BOX], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return at
    return None


def _first(text: str, *marks: str) -> int | None:
    return min((at for mark in marks if (at := text.find(mark)) >= 0), default=None)
