"""Sudoku grids of 4x4 and 9x9: rules, exact solver, random grids and puzzles.

A grid is a text of size * size digits, row after row; 0 marks an empty cell.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

SIZES = (4, 9)
# Every tenth 9x9 grid, by its hash, belongs to the test split.
_TEST_SHARE = 10
# Orders in which cells are emptied before a puzzle with one solution is given up.
_ORDERS = 20


@dataclass(frozen=True)
class Geometry:
    """Which cells must differ."""

    size: int
    """digits, rows, columns and boxes"""
    digits: str
    """1 to size"""
    units: tuple[tuple[int, ...], ...]
    """the cells of each row, column and box"""
    units_of: tuple[tuple[int, int, int], ...]
    """the numbers of the row, column and box of each cell"""

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.size * self.size


@cache
def geometry(size: int) -> Geometry:
    """The geometry of a size of `SIZES`."""
    edge = {4: 2, 9: 3}[size]
    of = [
        (row, size + column, 2 * size + edge * (row // edge) + column // edge)
        for row in range(size)
        for column in range(size)
    ]
    units = tuple(
        tuple(at for at, numbers in enumerate(of) if unit in numbers) for unit in range(3 * size)
    )
    return Geometry(size, "123456789"[:size], units, tuple(of))


def size_of(grid: str) -> int | None:
    """The size of a grid by its length; None for a text of another length."""
    return {size * size: size for size in SIZES}.get(len(grid))


def is_valid_grid(grid: str) -> bool:
    """Whether the digits fill every row, column and box, each of them once."""
    size = size_of(grid)
    if size is None:
        return False
    shape = geometry(size)
    return all({grid[at] for at in unit} == set(shape.digits) for unit in shape.units)


def keeps_clues(grid: str, puzzle: str) -> bool:
    """Whether the grid has the puzzle's digits where the puzzle has any."""
    return all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))


def solutions(puzzle: str, limit: int | None = None) -> list[str]:
    """All grids that complete a puzzle, in increasing order; the first ones up to a limit.

    >>> solutions("3102200002100320")
    ['3142243142131324']
    """
    found = islice(_search(puzzle), limit)
    return sorted(found) if limit is None else list(found)


@cache
def all_grids() -> tuple[str, ...]:
    """The 288 finished 4x4 grids in increasing order."""
    return tuple(solutions("0" * 16))


@cache
def split_grids(test_grids: int, seed: int) -> dict[str, tuple[str, ...]]:
    """The 4x4 grids of the train and of the test split, disjoint, together all."""
    grids = list(all_grids())
    random.Random(f"sudoku grids {seed}").shuffle(grids)
    return {"test": tuple(grids[:test_grids]), "train": tuple(grids[test_grids:])}


def split_of(grid: str) -> str:
    """The split a 9x9 grid belongs to, whatever digits stand for which and whatever the seed."""
    names: dict[str, str] = {}
    shape = "".join(names.setdefault(digit, str(len(names))) for digit in grid)
    digest = hashlib.sha256(shape.encode()).digest()
    return "test" if digest[0] % _TEST_SHARE == 0 else "train"


def random_grid(draw: random.Random, split: str) -> str:
    """A finished 9x9 grid of a split."""
    grid = next(_search("0" * 81, draw))
    while split_of(grid) != split:
        # A new order of the rows and columns of each band: another grid, for less than a search.
        rows, columns = ([3 * b + i for b in _order(draw) for i in _order(draw)] for _ in "ab")
        grid = "".join(grid[9 * row + column] for row in rows for column in columns)
    return grid


def emptied(draw: random.Random, solution: str, num_empty: int, unique: bool) -> str | None:
    """A puzzle of a grid with so many empty cells, with no other solution if `unique`.

    None where no order of the cells led to that many.
    """
    cells = range(len(solution))
    if not unique:
        return _without(solution, draw.sample(cells, num_empty))
    for _ in range(_ORDERS):
        puzzle, left = solution, num_empty
        order = draw.sample(cells, len(cells))
        for tried, at in enumerate(order):
            if left == 0:
                return puzzle
            if left > len(order) - tried:
                break
            fewer = _without(puzzle, [at])
            if not _has_another(fewer, at, solution[at]):
                puzzle, left = fewer, left - 1
        if left == 0:
            return puzzle
    return None


def _without(grid: str, empty: Sequence[int]) -> str:
    cells = set(empty)
    return "".join("0" if at in cells else digit for at, digit in enumerate(grid))


def _has_another(puzzle: str, at: int, digit: str) -> bool:
    """Whether an empty cell could hold another digit; the rest of the puzzle had one solution."""
    others = geometry(size_of(puzzle) or 0).digits.replace(digit, "")
    return any(
        next(_search(puzzle[:at] + other + puzzle[at + 1 :]), None) is not None for other in others
    )


def _order(draw: random.Random) -> list[int]:
    return draw.sample(range(3), 3)


def _search(puzzle: str, draw: random.Random | None = None) -> Iterator[str]:
    """Completions of a puzzle, most constrained cell first; digits in random order with `draw`."""
    size = size_of(puzzle)
    assert size is not None, "puzzles are checked when they are read"
    shape = geometry(size)
    free = [(1 << size) - 1] * len(shape.units)
    for at, digit in enumerate(puzzle):
        if digit != "0":
            bit = 1 << (int(digit) - 1)
            if not all(free[unit] & bit for unit in shape.units_of[at]):
                return
            for unit in shape.units_of[at]:
                free[unit] ^= bit
    grid = list(puzzle)
    yield from _fill(shape, grid, [at for at, d in enumerate(puzzle) if d == "0"], free, draw)


def _fill(
    shape: Geometry,
    grid: list[str],
    empty: list[int],
    free: list[int],
    draw: random.Random | None,
) -> Iterator[str]:
    if not empty:
        yield "".join(grid)
        return
    fewest, chosen, bits = shape.size + 1, 0, 0
    for index, at in enumerate(empty):
        row, column, box = shape.units_of[at]
        allowed = free[row] & free[column] & free[box]
        count = allowed.bit_count()
        if count < fewest:
            fewest, chosen, bits = count, index, allowed
            if count <= 1:
                break
    at = empty[chosen]
    empty[chosen] = empty[-1]
    empty.pop()
    numbers = [number for number in range(shape.size) if bits >> number & 1]
    if draw is not None:
        draw.shuffle(numbers)
    for number in numbers:
        for unit in shape.units_of[at]:
            free[unit] ^= 1 << number
        grid[at] = shape.digits[number]
        yield from _fill(shape, grid, empty, free, draw)
        for unit in shape.units_of[at]:
            free[unit] ^= 1 << number
    grid[at] = "0"
    empty.append(at)
    empty[chosen], empty[-1] = empty[-1], empty[chosen]
