"""Sudoku of 4x4 or 9x9 cells as text: prompts, generated puzzles, rewards.

A grid is 16 or 81 digits, row after row; 0 marks an empty cell. The splits share no grid, because
two puzzles of one grid are nearly the same problem: of the 288 4x4 grids some are chosen for the
test split, a 9x9 grid belongs to a split by its hash.

The reward is the published one by default (Zhao et al., "d1", arXiv:2504.12216): the fraction of
the empty cells that equal the listed solution, over the answer's digits padded with 0 or cut to
the cells of the grid.
`correct` asks for more and for less: a whole valid grid that keeps the clues, whichever of the
puzzle's solutions it is.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

from .answer_text import after_closing_tag, before_end_of_turn, tagged_answer
from .base import Example, Score, check_split, field_of, mean_details
from .generated import GeneratedExamples
from .sudoku_grid import (
    SIZES,
    emptied,
    geometry,
    is_valid_grid,
    keeps_clues,
    random_grid,
    split_grids,
)
from .table import Row, pick_fields, read_table, shorten
from .templates import Template, own_or, shot_rows, shots_text

PROMPTS = {
    "d1": """\
Solve this {size}x{size} Sudoku. The grid is written as {cells} characters, row by row from the \
top left; 0 marks an empty cell.

Every row, every column and every {box}x{box} box must hold each of the digits 1 to {size} exactly \
once, and the given digits stay as they are.

Think step by step, then give the finished grid: {cells} digits from 1 to {size} with no spaces or \
separators. Respond in exactly this format:
<reasoning>
your steps
</reasoning>
<answer>
the {cells} digits
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

_LONE_GRID = {
    cells: re.compile(rf"(?<![0-9])[0-9]{{{cells}}}(?![0-9])")
    for cells in (size * size for size in SIZES)
}
_NOT_DIGITS = re.compile(r"[^0-9]+")
_LETTERS = re.compile(r"[^\W\d_]")


@dataclass(frozen=True, kw_only=True)
class SudokuConfig:
    """Sudoku."""

    size: int = 4
    """4 or 9: rows, columns and digits of the grid"""
    template: Literal["d1", "plain"] = "d1"
    """d1: a prompt in words that asks for reasoning and answer tags; plain: the puzzle alone,
    answered by the digits alone, for tiny models"""
    prompt_template: str = ""
    """your own prompt, with {puzzle} and, if you like, {size}, {cells} and {box}: the
    text, or a file whose name ends in .txt; answers are read as `template` says"""
    shots: str = ""
    """examples with their answers before each prompt: a data file, or a JSON list of objects with
    puzzle and solution"""
    min_empty: int = 8
    """fewest empty cells of a generated puzzle"""
    max_empty: int = 12
    """most empty cells of a generated puzzle"""
    unique: bool = False
    """generated puzzles have exactly one solution; without it, they may have several"""
    num_train: int = 20_000
    """number of generated training puzzles"""
    num_test: int = 500
    """number of generated test puzzles"""
    test_grids: int = 48
    """how many of the 288 4x4 grids only test puzzles are made of; of 9x9 grids it is a tenth"""
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
        if self.size not in SIZES:
            raise ValueError(f"sudoku.size must be 4 or 9, got {self.size}")
        # Fewer than 4 clues (9x9: 17, McGuire et al., arXiv:1201.0749) always leave a choice.
        most = {4: 12, 9: 64}[self.size] if self.unique else self.size**2
        if not 1 <= self.min_empty <= self.max_empty <= most:
            raise ValueError(
                "sudoku.min_empty and sudoku.max_empty must satisfy 1 <= min_empty <= max_empty "
                f"<= {most}, got {self.min_empty} and {self.max_empty}"
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
        length = self.config.num_train if split == "train" else self.config.num_test
        return GeneratedExamples(lambda index: self._generate(split, index), length)

    def example(self, row: Row) -> Example:
        """The puzzle of a row; one that stands in words in a column question is found there."""
        return _example(row, self.config.columns, self.config.size)

    def prompt(self, example: Example) -> str:
        """The puzzle in the template's words, behind the few-shot examples."""
        return self._shots + self._ask(example)

    def demonstration(self, example: Example) -> str:
        """The solution in the template's format, with the noise the config asks for."""
        puzzle, solution = _fields(example, self.config.size)
        noise = self.config.demonstration_noise
        if noise:
            draw = random.Random(f"sudoku noise {self.config.seed} {puzzle} {solution}")
            solution = "".join(
                draw.choice(geometry(self.config.size).digits)
                if clue == "0" and draw.random() < noise
                else digit
                for clue, digit in zip(puzzle, solution, strict=True)
            )
        return self._answer(example, solution)

    def trace(self, example: Example) -> str:
        """How a right completion may begin: the example's own reasoning, or the rows one by one."""
        _, solution = _fields(example, self.config.size)
        if self.config.template == "plain":
            return solution
        size = self.config.size
        rows = (solution[at : at + size] for at in range(0, len(solution), size))
        words = "\n".join(f"row {number}: {row}" for number, row in enumerate(rows, 1))
        return f"<reasoning>\n{example.get('trace') or words}\n</reasoning>\n"

    def score(self, completion: str, example: Example) -> Score:
        """Fraction of the empty cells as listed, and whether the whole grid solves the puzzle."""
        puzzle, solution = _fields(example, self.config.size)
        num_cells = len(puzzle)
        plain = self.config.template == "plain"
        digits = answer_digits(completion, plain=plain, cells=num_cells)
        empty = [at for at, clue in enumerate(puzzle) if clue == "0"]
        padded = digits[:num_cells].ljust(num_cells, "0")
        cells_right = sum(padded[at] == solution[at] for at in empty)
        cells = cells_right / len(empty) if empty else 0.0
        # One digit too many is forgiven by the published metric, but such an answer is no grid.
        valid = len(digits) == num_cells and is_valid_grid(digits)
        correct = valid and keeps_clues(digits, puzzle)
        reward = self.config.cell_weight * cells + self.config.solved_weight * correct
        detail = {
            "cells": cells,
            "cells_right": cells_right,
            "empty": len(empty),
            "valid": valid,
            "parsed": bool(digits),
            "complete": len(digits) == num_cells,
        } | ({"answer": digits} if digits else {})
        return Score(reward, correct, detail)

    def metrics(self, scores: Sequence[Score]) -> dict[str, float]:
        """`cells`: right cells; `parsed`: answers with digits; `complete`: with a grid's."""
        return mean_details(scores, "cells", "parsed", "complete")

    @cached_property
    def _template(self) -> Template:
        option, config = "sudoku.prompt_template", self.config
        return own_or(config.prompt_template, PROMPTS[config.template], option).check(
            self._words("")
        )

    @cached_property
    def _shots(self) -> str:
        rows = shot_rows(self.config.shots, "sudoku.shots")
        examples = [self.example(row) for row in rows]
        return shots_text((self._ask(e), self._answer(e, e["solution"])) for e in examples)

    def _ask(self, example: Example) -> str:
        return self._template.fill(self._words(field_of(example, "puzzle", self.name)))

    def _words(self, puzzle: str) -> dict[str, str | int]:
        size = self.config.size
        return {"puzzle": puzzle, "size": size, "cells": size * size, "box": math.isqrt(size)}

    def _generate(self, split: str, index: int) -> dict[str, str]:
        config = self.config
        draw = random.Random(f"sudoku {config.seed} {split} {index}")
        if config.size == 4:
            solution = draw.choice(split_grids(config.test_grids, config.seed)[split])
        else:
            solution = random_grid(draw, split)
        num_empty = draw.randint(config.min_empty, config.max_empty)
        puzzle = emptied(draw, solution, num_empty, config.unique)
        if puzzle is None:
            raise ValueError(
                f"no puzzle with {num_empty} empty cells and one solution was found for the grid "
                f"{solution}; lower sudoku.max_empty or turn sudoku.unique off"
            )
        return {"puzzle": puzzle, "solution": solution}

    def _answer(self, example: Example, solution: str) -> str:
        trace = example.get("trace") or TRACE
        return DEMONSTRATIONS[self.config.template].format(trace=trace, solution=solution)


def answer_digits(completion: str, *, plain: bool = False, cells: int = 16) -> str:
    """The digits of the answer, "" if there is none; only 0-9 count as digits.

    Looked for in this order, as published evaluations do: the last answer tag; what follows a
    closing tag; the last run of exactly `cells` digits; the whole text, if it has no words or if
    plain.
    """
    text = before_end_of_turn(completion)
    for candidate in (tagged_answer(text) or "", after_closing_tag(text)):
        if digits := _NOT_DIGITS.sub("", candidate):
            return digits
    if grids := _LONE_GRID[cells].findall(text):
        return grids[-1]
    return _NOT_DIGITS.sub("", text) if plain or not _LETTERS.search(text) else ""


def _fields(example: Example, size: int) -> tuple[str, str]:
    puzzle, solution = (field_of(example, name, "sudoku") for name in ("puzzle", "solution"))
    for value in (puzzle, solution):
        if not isinstance(value, str) or len(value) != size * size:
            raise ValueError(
                f"a sudoku example's puzzle and solution must be strings of {size * size} digits, "
                f"got {shorten(value)}; sudoku.size is {size}"
            )
    return puzzle, solution


def _example(row: Row, columns: Mapping[str, str], size: int) -> dict[str, str]:
    question = row.values.get("question")
    if isinstance(question, str) and len(found := _LONE_GRID[size**2].findall(question)) == 1:
        row = Row({"puzzle": found[0]} | row.values, row.where)
    fields = pick_fields(row, COLUMNS, columns, "sudoku")
    puzzle = _cells(fields["puzzle"], "puzzle", True, size, row)
    solution = _cells(fields["solution"], "solution", False, size, row)
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


def _cells(value: object, name: str, may_be_empty: bool, size: int, row: Row) -> str:
    digits = geometry(size).digits
    meaning = f"digits 0-{size}, 0 for an empty cell" if may_be_empty else f"digits 1-{size}"
    expected = f"{row.where}: {name} must be a string of {size**2} characters ({meaning})"
    if not isinstance(value, str):
        raise ValueError(
            f"{expected}, got the {type(value).__name__} {shorten(value)}; "
            "store it as a string, a number loses its leading zeros"
        )
    cells = value.strip().replace(".", "0")
    if len(cells) != size**2 or not set(cells) <= set(digits + "0" * may_be_empty):
        other = next((other for other in SIZES if other**2 == len(cells) and other != size), None)
        hint = f"; sudoku.size {other} reads such grids" if other else ""
        raise ValueError(f"{expected}, got {shorten(value)} of length {len(value)}{hint}")
    return cells
