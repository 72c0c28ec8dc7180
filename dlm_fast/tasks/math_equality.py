r"""Whether two mathematical answers are equal: as texts, as numbers, at last symbolically.

The first two are decided here, exactly and at once. What they leave open goes to math-verify
(extra `math`), in worker processes because its parsers and sympy can hang, crash and eat memory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .math_numbers import same_collection, value_in_words, values
from .math_text import WORDS, clean, normal
from .worker_pool import WorkerPool

log = logging.getLogger(__name__)

MEMORY = 1 << 30
CACHED = 20_000
MOST_WORKERS = 8

# 52_8: digits in a base, which math-verify compares without their base.
_IN_BASE = re.compile(r"-?[0-9][0-9a-zA-Z]*_(?:[0-9]|\{[0-9]+\})")
# Letters without \\text may be variables, but hardly so many in a row.
_LONG_WORD = re.compile(r"[a-zA-Z]{4}")
# Behind these bounds an answer is not worth a worker's time: no answer of a data set is near them.
MAX_NESTING = 24
MAX_POWERS = 24
_LONG_NUMBER = re.compile(r"[0-9]{41}")
# Powers and factorials that nobody wants worked out: exponents of 7 digits, three powers on top of
# each other, factorials of 6 digits or of factorials.
_EXPLOSIVE = re.compile(r"\^ ?\{? ?-?[0-9]{7}|(?:\^ ?\{? ?[0-9]+ ?){3}|[0-9]{6} ?[})]* ?!|![ })]*!")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer equals a reference, and how that was found out."""

    equal: bool
    by: str
    """"text", "number" or "symbolic"; "open" where only math-verify could tell and it is not there;
    "refused" for expressions beyond all bounds; "timeout", "memory", "crash" or the exception of
    a worker, all of them not equal"""


class Equality:
    """Compares answers with references; safe in any thread, with a bounded memory of verdicts.

    Args:
        symbolic: ask math-verify where texts and numbers do not decide
        seconds: CPU time for one question to it
        workers: processes at once; 0: one per core, at most `MOST_WORKERS`
    """

    def __init__(self, *, symbolic: bool, seconds: float, workers: int) -> None:
        self.pool = None
        if symbolic:
            path = Path(__file__).with_name("math_worker.py")
            workers = workers or min(MOST_WORKERS, os.cpu_count() or 1)
            self.pool = WorkerPool(path, "same", workers=workers, seconds=seconds, memory=MEMORY)
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], Verdict] = OrderedDict()

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict per (answer, reference), in order."""
        found: dict[tuple[str, str], Verdict] = {}
        asked = []
        for pair in dict.fromkeys(pairs):
            verdict = self._remembered(pair) or plain_verdict(*pair)
            if verdict is None:
                asked.append(pair)
            else:
                found[pair] = verdict
        found |= zip(asked, self._ask(asked), strict=True)
        for pair, verdict in found.items():
            self._remember(pair, verdict)
        return [found[pair] for pair in pairs]

    def forget(self) -> None:
        """Empty the memory of verdicts."""
        with self._lock:
            self._known.clear()

    def close(self) -> None:
        """End the worker processes; later questions start new ones."""
        if self.pool is not None:
            self.pool.close()

    def _ask(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        if self.pool is None:
            return [Verdict(False, "open")] * len(pairs)
        outcomes = self.pool.map([(clean(answer), clean(reference)) for answer, reference in pairs])
        return [
            Verdict(outcome.value is True, outcome.failure or "symbolic") for outcome in outcomes
        ]

    def _remembered(self, pair: tuple[str, str]) -> Verdict | None:
        with self._lock:
            if pair in self._known:
                self._known.move_to_end(pair)
            return self._known.get(pair)

    def _remember(self, pair: tuple[str, str], verdict: Verdict) -> None:
        # A worker that was killed from outside says nothing about the answer.
        if verdict.by == "crash":
            return
        with self._lock:
            self._known[pair] = verdict
            while len(self._known) > CACHED:
                self._known.popitem(last=False)


def plain_verdict(answer: str, reference: str) -> Verdict | None:
    r"""The verdict of texts and numbers; None where they do not decide.

    >>> plain_verdict(r"20\%", "20"), plain_verdict("1/3", "0.3")
    (Verdict(equal=True, by='text'), Verdict(equal=False, by='number'))
    >>> plain_verdict("5 changes/day", "5")
    Verdict(equal=True, by='text')
    """
    text = normal(reference)
    if text and normal(answer) == text:
        return Verdict(True, "text")
    ours, theirs = values(answer), values(reference)
    if ours and theirs:
        return Verdict(bool(ours & theirs), "number")
    if theirs and (value := value_in_words(answer)) is not None:
        return Verdict(value in theirs, "number")
    if (same := same_collection(answer, reference)) is not None:
        return Verdict(same, "number")
    if _IN_BASE.fullmatch(text) or _IN_BASE.fullmatch(normal(answer)):
        return Verdict(False, "text")
    if "=" in text and "=" not in answer:
        # What stands on one side of an equation is not the equation; `normal` drops names.
        return Verdict(False, "text")
    if _is_name(reference, text):
        # Words would be read as products of letters, equal in any order.
        return Verdict(False, "text")
    return Verdict(False, "refused") if _beyond_bounds(answer) else None


def _is_name(reference: str, text: str) -> bool:
    r"""Whether a reference is a word, or the letter of a choice, and no product of variables."""
    marked = r"\text" in clean(reference) or bool(_LONG_WORD.search(text))
    return bool(WORDS.fullmatch(text) and marked) or (len(text) == 1 and text.isalpha())


def math_verify_is_installed() -> bool:
    """Whether the extra `math` is there; does not import it."""
    return importlib.util.find_spec("math_verify") is not None


@cache
def say_that_math_verify_is_missing() -> None:
    """One line in the log, once in the life of the program."""
    log.warning(
        "math-verify is not installed: answers are compared as texts and numbers only, so equal "
        "expressions in different forms count as wrong; pip install 'dlm_fast[math]'"
    )


def _beyond_bounds(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    powers = text.count("^") + text.count("**")
    return (
        deepest > MAX_NESTING
        or powers > MAX_POWERS
        or bool(_LONG_NUMBER.search(text) or _EXPLOSIVE.search(text.replace("**", "^")))
    )
