"""Arithmetic expressions: reading hostile text, exact values, search for a solution.

Nothing is ever handed to `eval`: a text must first pass an alphabet of digits, + - * / and
parentheses and limits on length, nesting and literals; then `ast` parses it and every node of the
tree is checked.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction

# Twice what six three-digit numbers need. The tree of so short a text cannot exhaust the stack.
MAX_LENGTH = 256
MAX_PARENTHESES = 32
MAX_DIGITS = 12

Tree = int | tuple[str, "Tree", "Tree"]

_ALPHABET = re.compile(r"[0-9+\-*/() ]+")
_FRACTION = re.compile(r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_VALUE = re.compile(r" *-? *[0-9.]+ *")
_SPELLINGS = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "\\(": "",
    "\\)": "",
    "\\[": "",
    "\\]": "",
    "\\,": " ",
    "\\ ": " ",
    "$": "",
    "\N{MULTIPLICATION SIGN}": "*",
    "\N{DOT OPERATOR}": "*",
    "\N{MIDDLE DOT}": "*",
    "\N{DIVISION SIGN}": "/",
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
}
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


class NotArithmetic(ValueError):
    """The text is no expression over integers, + - * / and parentheses within the limits."""


def plain_expression(text: str) -> str:
    r"""An answer as models write it, in plain signs: LaTeX operators, `= value`, a final stop.

    >>> plain_expression(r"\frac{(78 + 2)}{4} \times 3 = 60.")
    '((78 + 2))/(4) * 3'
    """
    if len(text) > MAX_LENGTH:
        raise NotArithmetic(f"longer than {MAX_LENGTH} characters")
    for spelling, sign in _SPELLINGS.items():
        text = text.replace(spelling, sign)
    # Fractions nest, innermost first; each pass removes one level of a text this short.
    while (replaced := _FRACTION.sub(r"(\1)/(\2)", text)) != text and len(text) <= MAX_LENGTH:
        text = replaced
    expression, equals, value = text.partition("=")
    if equals and _VALUE.fullmatch(value):
        text = expression
    return text.strip().removesuffix(".").strip()


def parse(text: str) -> ast.expr:
    """The checked tree of an expression; NotArithmetic for anything else."""
    if len(text) > MAX_LENGTH:
        raise NotArithmetic(f"longer than {MAX_LENGTH} characters")
    if not _ALPHABET.fullmatch(text):
        raise NotArithmetic("holds more than digits, + - * / and parentheses")
    if text.count("(") > MAX_PARENTHESES:
        raise NotArithmetic(f"more than {MAX_PARENTHESES} parentheses")
    if re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", text):
        raise NotArithmetic(f"a number of more than {MAX_DIGITS} digits")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise NotArithmetic("not an expression") from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise NotArithmetic(f"{type(node).__name__} is not arithmetic here")
    return tree


_ALLOWED = (ast.BinOp, ast.UnaryOp, ast.UAdd, ast.USub, ast.Constant, *_OPERATORS)


def numbers_of(tree: ast.expr) -> list[int]:
    """The integers an expression is made of."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]  # type: ignore[misc]


def value_of(tree: ast.expr) -> Fraction | None:
    """The exact value; None where something is divided by zero."""
    if isinstance(tree, ast.Constant):
        return Fraction(tree.value)  # type: ignore[arg-type]
    if isinstance(tree, ast.UnaryOp):
        value = value_of(tree.operand)
        return -value if value is not None and isinstance(tree.op, ast.USub) else value
    assert isinstance(tree, ast.BinOp), "parse lets no other node through"
    left, right = value_of(tree.left), value_of(tree.right)
    if left is None or right is None:
        return None
    return apply(_OPERATORS[type(tree.op)], left, right)


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction | None:
    """One operation in exact fractions; None for a division by zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left / right if right else None


def find_expression(numbers: Sequence[int], target: int) -> str | None:
    """An expression that uses each number once and equals the target; None if there is none.

    Tries every way to join two of the remaining values, so its time grows about 20-fold with each
    number; six take seconds in the worst case.

    >>> find_expression([30, 100, 93], 23)
    '93 + 30 - 100'
    """
    dead_ends: set[tuple[Fraction, ...]] = set()

    def search(values: list[tuple[Fraction, Tree]]) -> Tree | None:
        if len(values) == 1:
            return values[0][1] if values[0][0] == target else None
        state = tuple(sorted(value for value, _ in values))
        if state in dead_ends:
            return None
        for i, (left, left_tree) in enumerate(values):
            for j, (right, right_tree) in enumerate(values):
                if i == j:
                    continue
                rest = [values[k] for k in range(len(values)) if k not in (i, j)]
                for operator in "+-*/":
                    if operator in "+*" and i > j:
                        continue
                    value = apply(operator, left, right)
                    if value is None:
                        continue
                    found = search([*rest, (value, (operator, left_tree, right_tree))])
                    if found is not None:
                        return found
        dead_ends.add(state)
        return None

    tree = search([(Fraction(number), number) for number in numbers]) if numbers else None
    return None if tree is None else written(tree)


def written(tree: Tree) -> str:
    """A tree as text with the fewest parentheses."""
    if isinstance(tree, int):
        return str(tree)
    operator, left, right = tree
    rank = _PRECEDENCE[operator]
    left_text, right_text = written(left), written(right)
    if _rank(left) < rank:
        left_text = f"({left_text})"
    if _rank(right) < rank or (_rank(right) == rank and operator in "-/"):
        right_text = f"({right_text})"
    return f"{left_text} {operator} {right_text}"


def normal_text(tree: ast.expr) -> str:
    """A checked expression with the fewest parentheses, so that equal ones are mostly equal texts.

    >>> normal_text(parse("((30) + 93)-(100)"))
    '30 + 93 - 100'
    """
    return written(_tree_of(tree))


def steps_of(tree: ast.expr) -> list[str]:
    """The sums of a checked expression, inner ones first, each with its value.

    >>> steps_of(parse("(1 + 2) * 3 - 4 / 8"))
    ['1 + 2 = 3', '3 * 3 = 9', '4 / 8 = 1/2', '9 - 1/2 = 17/2']
    """
    steps: list[str] = []

    def value(node: Tree) -> Fraction | None:
        if isinstance(node, int):
            return Fraction(node)
        operator, left, right = node
        sides = value(left), value(right)
        if sides[0] is None or sides[1] is None:
            return None
        result = apply(operator, sides[0], sides[1])
        if result is not None:
            steps.append(f"{sides[0]} {operator} {sides[1]} = {result}")
        return result

    value(_tree_of(tree))
    return steps


def _tree_of(node: ast.expr) -> Tree:
    if isinstance(node, ast.Constant):
        return int(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp):
        tree = _tree_of(node.operand)
        if isinstance(node.op, ast.UAdd):
            return tree
        return -tree if isinstance(tree, int) else ("-", 0, tree)
    assert isinstance(node, ast.BinOp), "parse lets no other node through"
    return _OPERATORS[type(node.op)], _tree_of(node.left), _tree_of(node.right)


def _rank(tree: Tree) -> int:
    return 3 if isinstance(tree, int) else _PRECEDENCE[tree[0]]
