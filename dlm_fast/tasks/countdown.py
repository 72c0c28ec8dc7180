"""Countdown: reach a target with each of the given numbers exactly once and + - * /.

Rewards as published (Zhao et al., "d1", arXiv:2504.12216): 1 for a right expression, 0.1 for an
answer tag with anything else, 0 without the tag. `correct` also accepts an expression that stands
in a LaTeX box outside the tags, as d1's evaluation does.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, Literal

from . import arithmetic
from .answer_text import before_end_of_turn, last_box, tagged_answer
from .arithmetic import NotArithmetic
from .base import Example, Score, check_split, field_of, mean_details
from .generated import GeneratedExamples
from .table import Row, pick_fields, read_table, shorten
from .templates import Template, own_or, shot_rows, shots_text

PROMPTS = {
    "d1": """\
Using only the given numbers, write an arithmetic expression that equals exactly the target. \
You may use the operations +, -, * and / and parentheses, and you must use each number exactly once.

Think step by step, then give only the expression inside \\boxed{{}}, without an equals sign and \
without the target, for example \\boxed{{a + b * c}}. Respond in exactly this format:
<reasoning>
your steps
</reasoning>
<answer>
\\boxed{{...}}
</answer>

Numbers: [{numbers}]
Target: {target}
""",
    "plain": "{numbers}={target}:",
}

DEMONSTRATIONS = {
    "d1": "<reasoning>\n{trace}\n</reasoning>\n<answer>\n\\boxed{{{expression}}}\n</answer>",
    "plain": "{expression}",
}

COLUMNS = {
    "numbers": ("numbers", "nums", "input"),
    "target": ("target", "output"),
}

# Every tenth set of numbers, by its hash, belongs to the test split.
_TEST_SHARE = 10
_MAX_TRIES = 20_000


@dataclass(frozen=True, kw_only=True)
class CountdownConfig:
    """Countdown."""

    template: Literal["d1", "plain"] = "d1"
    """d1: a prompt in words that asks for reasoning and answer tags; plain: numbers and target
    alone, answered by the expression alone, for tiny models"""
    prompt_template: str = ""
    """your own prompt, with {numbers} and {target}: the text, or a file whose name ends in .txt;
    answers are read as `template` says"""
    shots: str = ""
    """examples with their answers before each prompt: a data file, or a JSON list of objects with
    numbers and target"""
    min_numbers: int = 3
    """fewest numbers of a generated problem"""
    max_numbers: int = 3
    """most numbers of a generated problem, at most 6"""
    max_number: int = 100
    """generated numbers lie in 1..max_number"""
    max_target: int = 100
    """generated targets lie in 1..max_target"""
    num_train: int = 20_000
    """number of generated training problems"""
    num_test: int = 256
    """number of generated test problems; they share no set of numbers with the training ones"""
    seed: int = 0
    """chooses the generated problems"""
    wrong_reward: float = 0.1
    """reward of an answer tag that holds anything but a right expression"""
    columns: dict[str, str] = field(default_factory=dict)
    """columns of a data file that hold the fields numbers and target, where it names them
    otherwise than the usual sets do"""

    def __post_init__(self) -> None:
        if self.template not in PROMPTS:
            raise ValueError(
                f"countdown.template must be one of {', '.join(PROMPTS)}, got {self.template!r}"
            )
        if not 2 <= self.min_numbers <= self.max_numbers <= 6:
            raise ValueError(
                "countdown.min_numbers and countdown.max_numbers must satisfy 2 <= min_numbers <= "
                f"max_numbers <= 6, got {self.min_numbers} and {self.max_numbers}"
            )
        for name in ("max_number", "max_target", "num_train", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"countdown.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.wrong_reward < 1:
            raise ValueError(
                f"countdown.wrong_reward must lie between 0 and 1, got {self.wrong_reward}"
            )


@dataclass(frozen=True)
class Countdown:
    """The task; `tasks.get("countdown", max_numbers=4)` makes one.

    >>> task = Countdown(CountdownConfig())
    >>> example = {"numbers": [30, 100, 93], "target": 23}
    >>> task.score("<answer>30 + 93 - 100</answer>", example).reward
    1.0
    """

    config: CountdownConfig = field(default_factory=CountdownConfig)
    name: str = "countdown"
    thread_safe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # read and checked when the task is made, not at the first prompt of a run
        _ = self._template, self._shots

    def load(self, path: str | None, split: str) -> Sequence[Example]:
        """Problems of a file with columns numbers and target, or generated ones."""
        check_split(split)
        if path is not None:
            return [self.example(row) for row in read_table(path)]
        length = self.config.num_train if split == "train" else self.config.num_test
        return GeneratedExamples(lambda index: self._generate(split, index), length)

    def example(self, row: Row) -> Example:
        """The problem of a row; a column answer may hold both, as [[30, 100, 93], 23]."""
        return _example(row, self.config.columns)

    def prompt(self, example: Example) -> str:
        """Numbers and target in the template's words, behind the few-shot examples."""
        return self._shots + self._ask(example)

    def demonstration(self, example: Example) -> str:
        """A right expression in the template's format."""
        numbers, target = _fields(example)
        expression = arithmetic.find_expression(numbers, target)
        if expression is None:
            raise ValueError(f"no expression over {list(numbers)} equals {target}: not solvable")
        trace = example.get("trace") or f"{expression} = {target}"
        return DEMONSTRATIONS[self.config.template].format(trace=trace, expression=expression)

    def trace(self, example: Example) -> str:
        """How a right completion may begin: the example's own reasoning, or its sums one by one."""
        numbers, target = _fields(example)
        expression = arithmetic.find_expression(numbers, target)
        if expression is None:
            raise ValueError(f"no expression over {list(numbers)} equals {target}: not solvable")
        if self.config.template == "plain":
            return expression
        words = "\n".join(arithmetic.steps_of(arithmetic.parse(expression)))
        return f"<reasoning>\n{example.get('trace') or words}\n</reasoning>\n"

    def score(self, completion: str, example: Example) -> Score:
        """1 for a right expression in the answer, `wrong_reward` for another answer, else 0."""
        numbers, target = _fields(example)
        plain = self.config.template == "plain"
        text = before_end_of_turn(completion)
        tagged = tagged_answer(text)
        answered = tagged is not None or (plain and bool(text.strip()))
        tree = next(filter(None, map(_read, _candidates(text, tagged, plain))), None)
        numbers_right = tree is not None and Counter(arithmetic.numbers_of(tree)) == Counter(
            numbers
        )
        # Evaluated only with the given numbers inside, so that no value grows out of hand.
        correct = tree is not None and numbers_right and arithmetic.value_of(tree) == target
        reward = (1.0 if correct else self.config.wrong_reward) if answered else 0.0
        detail: dict[str, Any] = {
            "answered": answered,
            "parsed": tree is not None,
            "numbers_right": numbers_right,
        }
        if tree is not None:
            detail["answer"] = arithmetic.normal_text(tree)
        return Score(reward, correct, detail)

    def metrics(self, scores: Sequence[Score]) -> dict[str, float]:
        """`answered`: with an answer tag; `parsed`: expressions; `numbers_right`: legal ones."""
        return mean_details(scores, "answered", "parsed", "numbers_right")

    @cached_property
    def _template(self) -> Template:
        option, config = "countdown.prompt_template", self.config
        text = PROMPTS[config.template]
        return own_or(config.prompt_template, text, option).check(["numbers", "target"])

    @cached_property
    def _shots(self) -> str:
        rows = shot_rows(self.config.shots, "countdown.shots")
        examples = [self.example(row) for row in rows]
        return shots_text((self._ask(e), self.demonstration(e)) for e in examples)

    def _ask(self, example: Example) -> str:
        numbers, target = _fields(example)
        separator = "," if self.config.template == "plain" else ", "
        return self._template.fill({"numbers": separator.join(map(str, numbers)), "target": target})

    def _generate(self, split: str, index: int) -> dict[str, Any]:
        config = self.config
        draw = random.Random(f"countdown {config.seed} {split} {index}")
        for _ in range(_MAX_TRIES):
            count = draw.randint(config.min_numbers, config.max_numbers)
            numbers = [draw.randint(1, config.max_number) for _ in range(count)]
            if split_of(numbers) != split:
                continue
            target = _random_value(numbers, draw)
            if target is not None and 1 <= target <= config.max_target and target.denominator == 1:
                return {"numbers": numbers, "target": int(target)}
        raise ValueError(
            f"no {split} problem with countdown.max_number={config.max_number} and "
            f"countdown.max_target={config.max_target} in {_MAX_TRIES} tries; raise them"
        )


def split_of(numbers: Sequence[int]) -> str:
    """The split a set of numbers belongs to, whatever their order and the seed."""
    digest = hashlib.sha256(repr(sorted(numbers)).encode()).digest()
    return "test" if digest[0] % _TEST_SHARE == 0 else "train"


def _random_value(numbers: Sequence[int], draw: random.Random) -> Fraction | None:
    values = [Fraction(number) for number in numbers]
    while len(values) > 1:
        left = values.pop(draw.randrange(len(values)))
        right = values.pop(draw.randrange(len(values)))
        value = arithmetic.apply(draw.choice("+-*/"), left, right)
        if value is None:
            return None
        values.append(value)
    return values[0]


def _fields(example: Example) -> tuple[Sequence[int], int]:
    numbers, target = (field_of(example, name, "countdown") for name in ("numbers", "target"))
    if not isinstance(numbers, list | tuple) or not all(isinstance(n, int) for n in numbers):
        raise ValueError(f"a countdown example's numbers must be integers, got {shorten(numbers)}")
    if not isinstance(target, int):
        raise ValueError(f"a countdown example's target must be an integer, got {shorten(target)}")
    return numbers, target


def _candidates(text: str, tagged: str | None, plain: bool) -> list[str | None]:
    # In the order of trust; the first one that reads as an expression is the answer.
    return [last_box(tagged or ""), tagged, last_box(text), text if plain else None]


def _read(candidate: str | None) -> Any:
    if not candidate:
        return None
    try:
        return arithmetic.parse(arithmetic.plain_expression(candidate.strip()))
    except NotArithmetic:
        return None


def _example(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    both = row.values.get("answer")
    if isinstance(both, list) and len(both) == 2 and isinstance(both[0], list):
        row = Row({"numbers": both[0], "target": both[1]} | row.values, row.where)
    fields = pick_fields(row, COLUMNS, columns, "countdown")
    numbers = fields["numbers"]
    if isinstance(numbers, str):
        numbers = numbers.strip().removeprefix("[").removesuffix("]").split(",")
    if not isinstance(numbers, list | tuple) or len(numbers) < 2:
        raise ValueError(
            f"{row.where}: numbers must be a list of at least two integers or a text like "
            f'"30,100,93", got {shorten(fields["numbers"])}'
        )
    trace = row.values.get("trace")
    return {
        "numbers": [_integer(number, "numbers", row) for number in numbers],
        "target": _integer(fields["target"], "target", row),
    } | ({"trace": str(trace)} if trace else {})


def _integer(value: object, name: str, row: Row) -> int:
    # A bool prints as a word and a negative number with a sign, so neither passes as digits.
    digits = str(value).strip() if isinstance(value, int | str) else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) <= arithmetic.MAX_DIGITS):
        raise ValueError(
            f"{row.where}: {name} must be whole numbers of at most {arithmetic.MAX_DIGITS} digits "
            f"and not negative, got {shorten(value)}"
        )
    return int(digits)
