"""Finds the places of kernel bodies that can be mutated and writes all mutants into one source.

A mutant is chosen at run time (mutant.h), so that one build serves them all. Mutants: a barrier or
a wait for copies is left out; a comparison becomes its neighbour (< and <=, > and >=, == and !=);
the right side of a comparison of integers, the step of a loop, a literal `+ 1` or `- 1` moves by
one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

BARRIER = re.compile(r"\bsync_(?:block|warp|cluster)\(\)")
COPY_WAIT = re.compile(r"\bcopy_wait<([^<>]+)>\(\)")
COMPARISON = re.compile(r"(?<=\s)(<=|>=|<|>|==|!=)(?=\s)")
ONE = re.compile(r"(?<=[+-] )1u?\b(?![.\w])")
LOOP = re.compile(r"\bfor \(")
INCREMENT = re.compile(r"^\s*(?:\+\+(\w+)|(\w+)\+\+|(\w+) ([+*])= (.+))\s*$", re.S)
# Evaluated by the compiler: nothing can be switched there.
FIXED = re.compile(
    r"//[^\n]*|^\s*#(?:[^\n]*\\\n)*[^\n]*|"
    r"\b(?:static_assert|constexpr|alignas|template <)[^;{]*",
    re.M,
)
# Operator to (name, the other operator's name, shifts that are not that other operator)
OPERATORS = {
    "<": ("LessThan", "AtMost", (False, True)),
    "<=": ("AtMost", "LessThan", (True, False)),
    ">": ("MoreThan", "AtLeast", (True, False)),
    ">=": ("AtLeast", "MoreThan", (False, True)),
    "==": ("Same", "Other", (True, True)),
    "!=": ("Other", "Same", (True, True)),
}
SYMBOL = {name: symbol for symbol, (name, *_) in OPERATORS.items()}


@dataclass(frozen=True)
class Mutant:
    """One change of one place."""

    id: int
    file: str
    line: int
    code: str
    change: str

    def key(self) -> tuple[str, str, str]:
        """What stays when lines above it come and go."""
        return self.file, self.code, self.change


@dataclass(frozen=True)
class _Edit:
    start: int
    end: int
    text: str
    mutants: tuple[Mutant, ...]


class Writer:
    """Numbers mutants across files."""

    def __init__(self) -> None:
        self.mutants: list[Mutant] = []

    def mutate(self, path: Path, name: str) -> str:
        """The text of a file with every mutant behind its switch."""
        source = path.read_text()
        fixed = [match.span() for match in FIXED.finditer(source)]
        finder = _Finder(source, name, self._next_id())
        for match in LOOP.finditer(source):
            finder.loop(match.end())
        for pattern, handler in (
            (BARRIER, finder.barrier),
            (COPY_WAIT, finder.copy_wait),
            (COMPARISON, finder.comparison),
            (ONE, finder.one),
        ):
            for match in pattern.finditer(source):
                if not any(start <= match.start() < end for start, end in fixed):
                    handler(match)
        self.mutants += [mutant for edit in finder.edits for mutant in edit.mutants]
        return finder.rewritten()

    def _next_id(self) -> int:
        return max((mutant.id for mutant in self.mutants), default=0) + 1


class _Finder:
    def __init__(self, source: str, name: str, first_id: int) -> None:
        self.source, self.name, self.next_id = source, name, first_id
        self.edits: list[_Edit] = []

    def rewritten(self) -> str:
        text, at = [], 0
        for edit in sorted(self.edits, key=lambda edit: edit.start):
            text += [self.source[at : edit.start], edit.text]
            at = edit.end
        return "".join([*text, self.source[at:]])

    def barrier(self, match: re.Match[str]) -> None:
        first = self._take(1)
        text = f"(dlm_mutant::on({first}) ? (void)0 : {match[0]})"
        self._edit(match.span(), text, (first, f"without {match[0]}"))

    def copy_wait(self, match: re.Match[str]) -> None:
        first = self._take(2)
        text = (
            f"(dlm_mutant::on({first}) ? (void)0 : dlm_mutant::on({first + 1}) ? "
            f"copy_wait<({match[1]}) + 1>() : {match[0]})"
        )
        changes = (first, f"without {match[0]}"), (first + 1, f"one copy more pending: {match[0]}")
        self._edit(match.span(), text, *changes)

    def comparison(self, match: re.Match[str]) -> None:
        first = self._take(3)
        name, other, (more, less) = OPERATORS[match[0]]
        kind = "==" if match[0] in ("==", "!=") else "<"
        site = f"dlm_mutant::Compare<{first}, dlm_mutant::{name}, dlm_mutant::{other}"
        text = f"{kind} {site}, {str(more).lower()}, {str(less).lower()}>() {kind}"
        column = match.start() - self.source.rfind("\n", 0, match.start())
        where = f"{match[0]} at column {column}"
        changes = [(first, f"{where}: {SYMBOL[other]}")]
        changes += [(first + 1, f"{where}: right side + 1")] if more else []
        changes += [(first + 2, f"{where}: right side - 1")] if less else []
        self._edit(match.span(), text, *changes)

    def one(self, match: re.Match[str]) -> None:
        if any(edit.start <= match.start() < edit.end for edit in self.edits):
            return  # inside the step of a loop
        first = self._take(2)
        sign = self.source[match.start() - 2]
        changes = (first, f"{sign} 1: {sign} 2"), (first + 1, f"{sign} 1: {sign} 0")
        self._edit(match.span(), f"({match[0]} + dlm_mutant::shift<{first}>())", *changes)

    def loop(self, start: int) -> None:
        """The step: what stands behind the second semicolon of the head."""
        head_end = _closing(self.source, start)
        parts = self.source[start:head_end].split(";")
        if len(parts) != 3:
            return
        step = INCREMENT.match(parts[2])
        if step is None:
            return
        first = self._take(2)
        span = head_end - len(parts[2]), head_end
        if step[1] or step[2]:  # one less would never end
            text = f" {step[1] or step[2]} += 1 + dlm_mutant::shift<{first}>()"
            self._edit(span, text, (first, "loop step + 1"))
            return
        text = f" {step[3]} {step[4]}= ({step[5]}) + dlm_mutant::shift<{first}>()"
        self._edit(span, text, (first, "loop step + 1"), (first + 1, "loop step - 1"))

    def _take(self, count: int) -> int:
        first = self.next_id
        self.next_id += count
        return first

    def _edit(self, span: tuple[int, int], text: str, *changes: tuple[int, str]) -> None:
        line = self.source.count("\n", 0, span[0]) + 1
        code = self.source.splitlines()[line - 1].strip()
        mutants = tuple(Mutant(id, self.name, line, code, change) for id, change in changes)
        self.edits.append(_Edit(*span, text, mutants))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opened before `start` closes."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError("an unclosed parenthesis")


def included(csrc: Path, body: str) -> list[str]:
    """A body and the files of csrc/cuda/device that it includes, by paths below csrc."""
    found, unread = [], [f"cuda/{body}.cuh"]
    while unread:
        name = unread.pop(0)
        found.append(name)
        text = (csrc / name).read_text()
        for header in re.findall(r'^#include "(cuda/device/\w+\.cuh)"', text, re.M):
            if header not in found + unread:
                unread.append(header)
    return found
