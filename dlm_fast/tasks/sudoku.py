"""4x4 Sudoku as text: prompts, generated puzzles, rewards.

A grid is 16 digits, row after row; 0 marks an empty cell. There are 288 finished grids. The splits
share no grid, because two puzzles of one grid are nearly the same problem.

The reward is the published one by default (Zhao et al., "d1", arXiv:2504.12216): the fraction of
the empty cells that equal the listed solution, over the answer's digits padded with 0 or cut to 16.
`correct` asks for more and for less: a whole valid grid that keeps the clues, whichever of the
puzzle's solutions it is.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import ClassVar, Literal

from .answer_text import after_closing_tag, before_end_of_turn, tagged_answer
from .base import Example, Score, check_split, field_of, mean_details
from .generated import GeneratedExamples
from .table import Row, pick_fields, read_table, shorten
from .templates import Template, own_or, shot_rows, shots_text

PROMPTS = {
    "d1": """\
Solve this 4x4 Sudoku. The grid is written as 16 characters, row by row from the top left; \
0 marks an empty cell.

Every row, every column and every 2x2 box must hold each of the digits 1 to 4 exactly once, and \
the given digits stay as they are.

Think step by step, then give the finished grid: 16 digits from 1 to 4 with no spaces or \
separators. Respond in exactly this format:
<reasoning>
your steps
</reasoning>
<answer>
the 16 digits
</answer>

Puzzle: {puzzle}
""",
    "plain": "{puzzle}=",
}

DEMONSTRATIONS = {
    "d1": "<reasoning>\n{trace}\n</reasoning>\n<answer>\n{solution}\n</answer>",
    "plain": "{solution}",
}

TRACE = "Each empty cell takes the digit that its row, its column and its box leave over."

COLUMNS = {
    "puzzle": ("puzzle", "puzzles", "quizzes", "input"),
    "solution": ("solution", "solutions", "output", "answer"),
}

_CELLS = range(16)
_UNITS = (
    [[4 * row + column for column in range(4)] for row in range(4)]
    + [[4 * row + column for row in range(4)] for column in range(4)]
    + [[8 * (box // 2) + 2 * (box % 2) + at for at in (0, 1, 4, 5)] for box in range(4)]
)
_LONE_GRID = re.compile(r"(?<![0-9])[0-9]{16}(?![0-9])")
_NOT_DIGITS = re.compile(r"[^0-9]+")
_LETTERS = re.compile(r"[^\W\d_]")


@dataclass(frozen=True, kw_only=True)
class SudokuConfig:
    """4x4 Sudoku."""

    template: Literal["d1", "plain"] = "d1"
    """d1: a prompt in words that asks for reasoning and answer tags; plain: the puzzle alone,
    answered by the digits alone, for tiny models"""
    prompt_template: str = ""
    """your own prompt, with {puzzle} for the puzzle: the text, or a file whose name ends in .txt;
    answers are read as `template` says"""
    shots: str = ""
    """examples with their answers before each prompt: a data file, or a JSON list of objects with
    puzzle and solution"""
    min_empty: int = 8
    """fewest empty cells of a generated puzzle"""
    max_empty: int = 12
    """most empty cells of a generated puzzle"""
    num_train: int = 20_000
    """number of generated training puzzles"""
    num_test: int = 500
    """number of generated test puzzles"""
    test_grids: int = 48
    """how many of the 288 grids only test puzzles are made of"""
    seed: int = 0
    """chooses the test grids, the generated puzzles and the noise of the demonstrations"""
    cell_weight: float = 1.0
    """reward of a completion with all empty cells as in the listed solution, less in proportion"""
    solved_weight: float = 0.0
    """reward added when the whole grid is a valid solution of the puzzle"""
    demonstration_noise: float = 0.0
    """fraction of the empty cells that demonstrations fill with a random digit, so that a warm
    start leaves something to learn"""
    columns: dict[str, str] = field(default_factory=dict)
    """columns of a data file that hold the fields puzzle and solution, where it names them
    otherwise than the usual sets do"""

    def __post_init__(self) -> None:
        if self.template not in PROMPTS:
            raise ValueError(
                f"sudoku.template must be one of {', '.join(PROMPTS)}, got {self.template!r}"
            )
        if not 1 <= self.min_empty <= self.max_empty <= 16:
            raise ValueError(
                "sudoku.min_empty and sudoku.max_empty must satisfy 1 <= min_empty <= max_empty "
                f"<= 16, got {self.min_empty} and {self.max_empty}"
            )
        if not 1 <= self.test_grids <= 287:
            raise ValueError(f"sudoku.test_grids must lie in 1..287, got {self.test_grids}")
        for name in ("num_train", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"sudoku.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("cell_weight", "solved_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"sudoku.{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if not 0 <= self.demonstration_noise <= 1:
            raise ValueError(
                f"sudoku.demonstration_noise must lie in 0..1, got {self.demonstration_noise}"
            )


@dataclass(frozen=True)
class Sudoku:
    """The task; `tasks.get("sudoku", min_empty=8)` makes one.

    >>> task = Sudoku(SudokuConfig())
    >>> example = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    >>> task.score("<answer>3142243142131324</answer>", example).reward
    1.0
    """

    config: SudokuConfig = field(default_factory=SudokuConfig)
    name: str = "sudoku"
    thread_safe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # read and checked when the task is made, not at the first prompt of a run
        _ = self._template, self._shots

    def load(self, path: str | None, split: str) -> Sequence[Example]:
        """Puzzles of a file with columns puzzle and solution, or generated ones."""
        check_split(split)
        if path is not None:
            return [self.example(row) for row in read_table(path)]
        grids = split_grids(self.config.test_grids, self.config.seed)[split]
        length = self.config.num_train if split == "train" else self.config.num_test

        def make(index: int) -> dict[str, str]:
            draw = random.Random(f"sudoku {self.config.seed} {split} {index}")
            solution = draw.choice(grids)
            num_empty = draw.randint(self.config.min_empty, self.config.max_empty)
            empty = set(draw.sample(_CELLS, num_empty))
            puzzle = "".join("0" if at in empty else solution[at] for at in _CELLS)
            return {"puzzle": puzzle, "solution": solution}

        return GeneratedExamples(make, length)

    def example(self, row: Row) -> Example:
        """The puzzle of a row; one that stands in words in a column question is found there."""
        return _example(row, self.config.columns)

    def prompt(self, example: Example) -> str:
        """The puzzle in the template's words, behind the few-shot examples."""
        return self._shots + self._ask(example)

    def demonstration(self, example: Example) -> str:
        """The solution in the template's format, with the noise the config asks for."""
        puzzle, solution = _fields(example)
        noise = self.config.demonstration_noise
        if noise:
            draw = random.Random(f"sudoku noise {self.config.seed} {puzzle} {solution}")
            solution = "".join(
                draw.choice("1234") if clue == "0" and draw.random() < noise else digit
                for clue, digit in zip(puzzle, solution, strict=True)
            )
        return self._answer(example, solution)

    def score(self, completion: str, example: Example) -> Score:
        """Fraction of the empty cells as listed, and whether the whole grid solves the puzzle."""
        puzzle, solution = _fields(example)
        digits = answer_digits(completion, plain=self.config.template == "plain")
        empty = [at for at in _CELLS if puzzle[at] == "0"]
        padded = digits[:16].ljust(16, "0")
        cells_right = sum(padded[at] == solution[at] for at in empty)
        cells = cells_right / len(empty) if empty else 0.0
        # A 17th digit is forgiven by the published metric, but such an answer is no grid.
        valid = is_valid_grid(digits)
        correct = valid and keeps_clues(digits, puzzle)
        reward = self.config.cell_weight * cells + self.config.solved_weight * correct
        detail = {
            "cells": cells,
            "cells_right": cells_right,
            "empty": len(empty),
            "valid": valid,
            "parsed": bool(digits),
            "complete": len(digits) == 16,
        } | ({"answer": digits} if digits else {})
        return Score(reward, correct, detail)

    def metrics(self, scores: Sequence[Score]) -> dict[str, float]:
        """`cells`: right cells; `parsed`: answers with digits; `complete`: with exactly 16."""
        return mean_details(scores, "cells", "parsed", "complete")

    @cached_property
    def _template(self) -> Template:
        option, config = "sudoku.prompt_template", self.config
        return own_or(config.prompt_template, PROMPTS[config.template], option).check(["puzzle"])

    @cached_property
    def _shots(self) -> str:
        rows = shot_rows(self.config.shots, "sudoku.shots")
        examples = [self.example(row) for row in rows]
        return shots_text((self._ask(e), self._answer(e, e["solution"])) for e in examples)

    def _ask(self, example: Example) -> str:
        return self._template.fill({"puzzle": field_of(example, "puzzle", self.name)})

    def _answer(self, example: Example, solution: str) -> str:
        trace = example.get("trace") or TRACE
        return DEMONSTRATIONS[self.config.template].format(trace=trace, solution=solution)


def answer_digits(completion: str, *, plain: bool = False) -> str:
    """The digits of the answer, "" if there is none; only 0-9 count as digits.

    Looked for in this order, as published evaluations do: the last answer tag; what follows a
    closing tag; the last run of exactly 16 digits; the whole text, if it has no words or if plain.
    """
    text = before_end_of_turn(completion)
    for candidate in (tagged_answer(text) or "", after_closing_tag(text)):
        if digits := _NOT_DIGITS.sub("", candidate):
            return digits
    if grids := _LONE_GRID.findall(text):
        return grids[-1]
    return _NOT_DIGITS.sub("", text) if plain or not _LETTERS.search(text) else ""


def is_valid_grid(grid: str) -> bool:
    """Whether 16 characters fill every row, column and box with 1, 2, 3, 4."""
    return len(grid) == 16 and all({grid[at] for at in unit} == set("1234") for unit in _UNITS)


def keeps_clues(grid: str, puzzle: str) -> bool:
    """Whether the grid has the puzzle's digits where the puzzle has any."""
    return all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))


@cache
def all_grids() -> tuple[str, ...]:
    """The 288 finished grids in increasing order."""
    neighbours = [{cell for unit in _UNITS if at in unit for cell in unit} for at in _CELLS]
    grids = [""]
    for at in _CELLS:
        earlier = [cell for cell in neighbours[at] if cell < at]
        grids = [
            grid + digit
            for grid in grids
            for digit in "1234"
            if all(grid[cell] != digit for cell in earlier)
        ]
    return tuple(grids)


def solutions(puzzle: str) -> list[str]:
    """All grids that complete a puzzle.

    >>> solutions("3102200002100320")
    ['3142243142131324']
    """
    return [grid for grid in all_grids() if keeps_clues(grid, puzzle)]


@cache
def split_grids(test_grids: int, seed: int) -> dict[str, tuple[str, ...]]:
    """The grids of the train and of the test split, disjoint, together all."""
    grids = list(all_grids())
    random.Random(f"sudoku grids {seed}").shuffle(grids)
    return {"test": tuple(grids[:test_grids]), "train": tuple(grids[test_grids:])}


def _fields(example: Example) -> tuple[str, str]:
    puzzle, solution = (field_of(example, name, "sudoku") for name in ("puzzle", "solution"))
    for value in (puzzle, solution):
        if not isinstance(value, str) or len(value) != 16:
            raise ValueError(
                f"a sudoku example's puzzle and solution must be strings of 16 digits, "
                f"got {shorten(value)}"
            )
    return puzzle, solution


def _example(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    question = row.values.get("question")
    if isinstance(question, str) and len(found := _LONE_GRID.findall(question)) == 1:
        row = Row({"puzzle": found[0]} | row.values, row.where)
    fields = pick_fields(row, COLUMNS, columns, "sudoku")
    puzzle = _cells(fields["puzzle"], "puzzle", "digits 0-4, 0 for an empty cell", "01234", row)
    solution = _cells(fields["solution"], "solution", "digits 1-4", "1234", row)
    if "0" not in puzzle:
        raise ValueError(f"{row.where}: the puzzle has no empty cell (0), got {puzzle}")
    if not is_valid_grid(solution):
        raise ValueError(
            f"{row.where}: the solution repeats a digit in a row, column or box, got {solution}"
        )
    if not keeps_clues(solution, puzzle):
        raise ValueError(
            f"{row.where}: the solution {solution} contradicts the clues of the puzzle {puzzle}"
        )
    trace = row.values.get("trace")
    return {"puzzle": puzzle, "solution": solution} | ({"trace": str(trace)} if trace else {})


def _cells(value: object, name: str, meaning: str, allowed: str, row: Row) -> str:
    expected = f"{row.where}: {name} must be a string of 16 characters ({meaning})"
    if not isinstance(value, str):
        raise ValueError(
            f"{expected}, got the {type(value).__name__} {shorten(value)}; "
            "store it as a string, a number loses its leading zeros"
        )
    cells = value.strip().replace(".", "0")
    if len(cells) != 16 or not set(cells) <= set(allowed):
        raise ValueError(f"{expected}, got {shorten(value)} of length {len(value)}")
    return cells
