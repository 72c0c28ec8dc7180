r"""Mathematical problems with one final answer: the tasks `gsm8k` and `math`.

`correct` is whether the final answer equals the reference (`math_equality`), whatever the format
around it; the reward is 1 or 0, or the shaped one of d1 (`math_rewards`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from . import math_rewards
from .answer_text import boxes
from .base import Example, Score, check_split, field_of, mean_details
from .math_answer import HASHES, MAX_ANSWER, Found, Marks, final_answer
from .math_equality import (
    Equality,
    Verdict,
    math_verify_is_installed,
    say_that_math_verify_is_missing,
)
from .math_numbers import canonical, values
from .math_rewards import Shaped
from .table import Row, pick_fields, read_table, shorten
from .templates import Template, own_or, shot_rows, shots_text

PROMPTS = {
    "d1": """\
Solve the following math problem. Think step by step, then give the final answer inside \
\\boxed{{}}. Respond in exactly this format:
<reasoning>
your steps
</reasoning>
<answer>
\\boxed{{...}}
</answer>

Problem: {question}
""",
    "plain": "{question}\n",
}
DEMONSTRATIONS = {
    "d1": "<reasoning>\n{trace}\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer>",
    "plain": "{trace}\n\\boxed{{{answer}}}",
}

QUESTIONS = ("question", "problem", "prompt", "input")
ANSWERS = ("answer", "ground_truth_answer", "ground_truth", "final_answer", "target", "output")
SOLUTIONS = ("trace", "solution")
# Failures of a worker on an answer: the answer's own doing, so it counts as wrong and is reported.
LIMITS = ("timeout", "memory", "crash")


@dataclass(frozen=True)
class Problems:
    """What tells one data set of problems from another."""

    name: str
    """the task's name"""
    only_numbers: bool
    """whether every reference is a number"""
    shaped: Callable[[str, str | None, bool], Shaped]
    """its shaped reward"""


GSM8K = Problems("gsm8k", True, math_rewards.gsm8k)
MATH = Problems("math", False, math_rewards.math)


@dataclass(frozen=True, kw_only=True)
class MathConfig:
    """Problems with one final answer (gsm8k, math)."""

    template: Literal["d1", "plain"] = "d1"
    """d1: a prompt in words that asks for reasoning, answer tags and a box; plain: the question
    alone"""
    prompt_template: str = ""
    """your own prompt, with {question}: the text, or a file whose name ends in .txt"""
    shots: str = ""
    """examples with their answers before each prompt: a data file, or a JSON list of objects with
    question, answer and, if you like, trace"""
    reward: Literal["correct", "d1"] = "correct"
    """correct: 1 for a right answer, else 0; d1: the shaped reward published with d1"""
    boxed: bool = True
    """the last box is the final answer"""
    answer_tags: bool = True
    """the last answer tag is, where there is no box"""
    hashes: bool = True
    """what follows the last #### on its line is, where there is neither"""
    last_number: bool = False
    """the last number of the text is, where nothing is marked; a completion that ran out of tokens
    ends in some number too"""
    symbolic: Literal["auto", "on", "off"] = "auto"
    """ask math-verify where texts and numbers do not decide; auto: if it is installed"""
    seconds: float = 3.0
    """CPU time for one question to math-verify; an answer that takes longer is wrong"""
    workers: int = 0
    """processes that run math-verify; 0: one per core, at most 8"""
    columns: dict[str, str] = field(default_factory=dict)
    """columns of a data file that hold the fields question, answer and trace, where it names them
    otherwise than the usual sets do"""

    def __post_init__(self) -> None:
        for name, known in (
            ("template", tuple(PROMPTS)),
            ("reward", ("correct", "d1")),
            ("symbolic", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"math.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not (self.boxed or self.answer_tags or self.hashes or self.last_number):
            raise ValueError(
                "no final answer can be found with math.boxed, math.answer_tags, math.hashes and "
                "math.last_number all off; turn one on"
            )
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"math.seconds must be positive and finite, got {self.seconds}")
        if self.workers < 0:
            raise ValueError(f"math.workers must be 0 or more, got {self.workers}")

    @property
    def marks(self) -> Marks:
        """The marks that are on."""
        return Marks(
            boxed=self.boxed,
            answer_tags=self.answer_tags,
            hashes=self.hashes,
            last_number=self.last_number,
        )


@dataclass(frozen=True)
class MathTask:
    r"""The task; `tasks.get("math", last_number=True)` makes one.

    >>> task = MathTask(MathConfig(symbolic="off"), GSM8K)
    >>> task.score(r"<answer>\boxed{5 eggs}</answer>", {"question": "?", "answer": "5"}).reward
    1.0
    """

    config: MathConfig
    problems: Problems
    thread_safe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # read and checked when the task is made, not at the first prompt of a run
        _ = self._template, self._shots, self._equality

    @property
    def name(self) -> str:
        """gsm8k or math."""
        return self.problems.name

    def load(self, path: str | None, split: str) -> Sequence[Example]:
        """Problems of a file with a question and an answer, or a solution that ends in one."""
        check_split(split)
        if path is None:
            raise ValueError(
                f"task {self.name} generates no data: give a JSONL, CSV or parquet file with the "
                "columns question and answer"
            )
        return [self.example(row) for row in read_table(path)]

    def example(self, row: Row) -> dict[str, str]:
        """The problem of a row of a data file; ValueError names file and line."""
        known = {"question": QUESTIONS, "answer": (*ANSWERS, *SOLUTIONS)}
        columns = {name: self.config.columns[name] for name in self.config.columns if name in known}
        fields = pick_fields(row, known, columns, self.name)
        question = fields["question"]
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{row.where}: question must be a text, got {shorten(question)}")
        answer, trace = _reference(fields["answer"], row)
        if self.problems.only_numbers and not values(answer):
            raise ValueError(
                f"{row.where}: a {self.name} answer must be a number, got {shorten(answer)}; "
                'the task "math" takes any expression'
            )
        trace = _trace(row, self.config.columns) or trace
        return {"question": question, "answer": answer} | ({"trace": trace} if trace else {})

    def prompt(self, example: Example) -> str:
        """The question in the template's words, behind the few-shot examples."""
        return self._shots + self._ask(example)

    def demonstration(self, example: Example) -> str:
        """The example's own solution in the template's format."""
        _, answer = self._fields(example)
        trace = example.get("trace")
        if not trace:
            raise ValueError(
                f"task {self.name} has no demonstration without a solution: the data file needs a "
                f"column {' or '.join(SOLUTIONS)}"
            )
        return DEMONSTRATIONS[self.config.template].format(trace=str(trace).strip(), answer=answer)

    def score(self, completion: str, example: Example) -> Score:
        """The verdict on one completion; `score_many` is faster for several."""
        return self.score_many([completion], [example])[0]

    def score_many(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Score]:
        """Verdicts in order; what math-verify must decide is decided side by side."""
        references = [self._fields(example)[1] for example in examples]
        found = [final_answer(completion, self.config.marks) for completion in completions]
        pairs = {
            at: (answer.text, reference)
            for at, (answer, reference) in enumerate(zip(found, references, strict=True))
            if answer is not None
        }
        verdicts = dict(zip(pairs, self._equality.verdicts(list(pairs.values())), strict=True))
        return [
            self._score(completion, found[at], verdicts.get(at))
            for at, completion in enumerate(completions)
        ]

    def metrics(self, scores: Sequence[Score]) -> dict[str, float]:
        """`answered`: with a final answer; `boxed`: in a box; `limits`: ended by a limit."""
        return mean_details(scores, "answered", "boxed", "limits")

    def close(self) -> None:
        """End the worker processes; scoring again starts new ones."""
        self._equality.close()

    def _score(self, completion: str, found: Found | None, verdict: Verdict | None) -> Score:
        correct = verdict is not None and verdict.equal
        detail: dict[str, Any] = {
            "answered": found is not None,
            "boxed": found is not None and found.mark == "boxed",
            "limits": verdict is not None and verdict.by in LIMITS,
        }
        if found is not None and verdict is not None:
            detail |= {"answer": canonical(found.text), "found": found.text}
            detail |= {"mark": found.mark, "by": verdict.by}
        if self.config.reward == "correct":
            return Score(float(correct), correct, detail)
        shaped = self.problems.shaped(completion, found.text if found else None, correct)
        return Score(shaped.reward, correct, detail | {"parts": shaped.parts})

    @cached_property
    def _equality(self) -> Equality:
        config, installed = self.config, math_verify_is_installed()
        if config.symbolic == "on" and not installed:
            raise ValueError(
                "math.symbolic is on, but math-verify is not installed: "
                "pip install 'dlm_fast[math]', or set it to auto"
            )
        if config.symbolic == "auto" and not installed:
            say_that_math_verify_is_missing()
        symbolic = installed and config.symbolic != "off"
        return Equality(symbolic=symbolic, seconds=config.seconds, workers=config.workers)

    @cached_property
    def _template(self) -> Template:
        text = PROMPTS[self.config.template]
        option = f"{self.name}.prompt_template"
        return own_or(self.config.prompt_template, text, option).check(["question"])

    @cached_property
    def _shots(self) -> str:
        rows = shot_rows(self.config.shots, f"{self.name}.shots")
        examples = [self.example(row) for row in rows]
        return shots_text((self._ask(e), self._shown(e)) for e in examples)

    def _ask(self, example: Example) -> str:
        return self._template.fill({"question": self._fields(example)[0]})

    def _shown(self, example: Example) -> str:
        if example.get("trace"):
            return self.demonstration(example)
        return f"\\boxed{{{example['answer']}}}"

    def _fields(self, example: Example) -> tuple[str, str]:
        question, answer = (field_of(example, name, self.name) for name in ("question", "answer"))
        for name, value in (("question", question), ("answer", answer)):
            if not isinstance(value, str):
                raise ValueError(
                    f"a {self.name} example's {name} must be a text, got {shorten(value)}; load it "
                    f"with tasks.get({self.name!r}).load(path, split)"
                )
        return question, answer


def gsm8k_task(config: MathConfig) -> MathTask:
    """Grade-school word problems; every answer is a number."""
    return MathTask(config, GSM8K)


def math_task(config: MathConfig) -> MathTask:
    """Competition problems; answers are expressions in LaTeX."""
    return MathTask(config, MATH)


def _reference(value: object, row: Row) -> tuple[str, str]:
    r"""The answer in a column, and the solution before it where the column holds one.

    GSM8K's answers are solutions that end in `#### 18`; MATH's solutions hold \boxed{18}.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{row.where}: answer must be a text or a number, got {shorten(value)}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{row.where}: answer must be finite, got {value}")
        value = int(value) if value == int(value) else value
    text, trace = str(value).strip(), ""
    if HASHES in text:
        trace, _, text = (part.strip() for part in text.rpartition(HASHES))
    elif (box := next(boxes(text), None)) is not None:
        trace, text = text, box.content
    if not text or len(text) > MAX_ANSWER:
        raise ValueError(
            f"{row.where}: answer must have 1 to {MAX_ANSWER} characters, or be a solution with "
            f"\\boxed{{}} or ####, got {shorten(value)}"
        )
    return text, trace


def _trace(row: Row, columns: Mapping[str, str]) -> str:
    if "trace" in columns:
        return str(pick_fields(row, {"trace": ()}, {"trace": columns["trace"]}, "math")["trace"])
    lowered = {str(column).lower(): column for column in row.values}
    named = [row.values[lowered[name]] for name in SOLUTIONS if name in lowered]
    return next((str(trace).strip() for trace in named if trace), "")
