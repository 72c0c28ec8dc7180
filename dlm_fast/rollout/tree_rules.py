"""What ends a path of a tree: answers, end of text, limits, repetitions.

Source: TreePO, arXiv 2508.17445; the order of the rules is its code's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dlm_fast.rollout.tree_config import TreeConfig

LOOK_BACK = 256
"""tokens at the end of a path that are searched for an answer, so that one that lies across the
edge of a segment is seen"""
_TEXT_WINDOW, _TOKEN_WINDOW, _TIMES = 32, 16, 8
_BOX = "\\boxed{"
_DEEPEST = 3
"""pairs of braces inside one another in a box"""


class Reason(IntEnum):
    """Why a path ended; a larger number is a better end."""

    UNFINISHED = 1
    REPETITION = 2
    MAX_TOKENS = 3
    MAX_DEPTH = 4
    EOS = 5
    UNCLOSED = 6
    ANSWER = 7


@dataclass(frozen=True, kw_only=True)
class SegmentEnd:
    """A path at the end of a segment."""

    segment_ids: Sequence[int]
    """tokens of the segment"""
    response_ids: Sequence[int]
    """tokens of the path without the prompt"""
    depth: int
    """segments of the path"""
    is_stopped: bool
    """an end-of-text token was drawn"""
    max_tokens: int
    """most tokens of a response"""


def classify(
    end: SegmentEnd, config: TreeConfig, decode: Callable[[Sequence[int]], str]
) -> Reason | None:
    """Why the path ends here, or None: it goes on. ``decode``: tokens to text."""
    if config.repetition_first and _repeats(end, config, decode):
        return Reason.REPETITION
    if (answered := _answer(end, config, decode)) is not None:
        return answered
    if end.is_stopped:
        return Reason.EOS
    if len(end.response_ids) >= end.max_tokens:
        return Reason.MAX_TOKENS
    if end.depth >= config.max_depth:
        return Reason.MAX_DEPTH
    if not config.repetition_first and _repeats(end, config, decode):
        return Reason.REPETITION
    return None


def _answer(
    end: SegmentEnd, config: TreeConfig, decode: Callable[[Sequence[int]], str]
) -> Reason | None:
    if config.answer == "none" or not (end.is_stopped or config.answer == "boxed_as_eos"):
        return None
    count = len(end.segment_ids)
    if not config.compat:
        count = max(count, LOOK_BACK)
    text = decode(end.response_ids[-count:])
    if has_closed_box(text):
        return Reason.ANSWER
    return Reason.UNCLOSED if end.is_stopped and _BOX in text else None


def _repeats(end: SegmentEnd, config: TreeConfig, decode: Callable[[Sequence[int]], str]) -> bool:
    if config.repetition == "none":
        return False
    if config.repetition == "token":
        return has_repetition(end.segment_ids, _TOKEN_WINDOW, _TIMES)
    return has_repetition([ord(c) for c in decode(end.segment_ids)], _TEXT_WINDOW, _TIMES)


def has_closed_box(text: str) -> bool:
    r"""Whether some ``\boxed{...}`` is closed, with at most three braces open inside it."""
    begin = text.find(_BOX)
    while begin >= 0:
        depth = 0
        for character in text[begin + len(_BOX) :]:
            if character == "{":
                depth += 1
                if depth > _DEEPEST:
                    break
            elif character == "}":
                if depth == 0:
                    return True
                depth -= 1
        begin = text.find(_BOX, begin + 1)
    return False


def has_repetition(items: Sequence[int], window: int, times: int) -> bool:
    """Whether some run of ``window`` items occurs at least ``times`` times, overlaps counted. Time
    grows with the number of items alone."""
    count = len(items) - window + 1
    if count < times:
        return False
    # hash of a window: sum of item * base^position, shifted to one position; modulo 2^64
    with np.errstate(over="ignore"):
        value = np.asarray(items, dtype=np.int64).astype(np.uint64) + np.uint64(1)
        powers = np.full(len(items) + 1, 0x9E3779B97F4A7C15, dtype=np.uint64)
        powers[0] = 1
        powers = np.multiply.accumulate(powers)
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(value * powers[:-1])])
        hashed = (total[window:] - total[:-window]) * powers[len(items) - np.arange(count)]
    found, counts = np.unique(hashed, return_counts=True)
    for one in found[counts >= times]:  # equal hashes are looked at: windows can collide
        seen: dict[tuple[int, ...], int] = {}
        for begin in np.flatnonzero(hashed == one).tolist():
            run = tuple(items[begin : begin + window])
            seen[run] = seen.get(run, 0) + 1
        if max(seen.values()) >= times:
            return True
    return False
