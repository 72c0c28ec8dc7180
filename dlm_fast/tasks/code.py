"""Code: write a function that passes tests, or a program that prints what it should.

HumanEval (Chen et al., arXiv:2107.03374), MBPP (Austin et al., arXiv:2108.07732) and programs with
inputs and outputs. The reward is 1 if a fenced block exists and passes every test, else 0, as BGPO
trains; TraceRL's is the fraction of tests passed (`reward="fraction"`). Snippets run in a sandbox,
verdicts are made outside of it: docs/code_sandbox.md.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from .base import Example, Score, check_split, field_of, mean_details
from .code_data import example_of, tests_of
from .code_text import DONE, find_code, normal_code
from .sandbox.child import Limits
from .sandbox.isolation import MODES, meaning
from .sandbox.verdicts import (
    FunctionTests,
    Outcome,
    ProgramTests,
    check_functions,
    check_programs,
    working_mode,
)
from .table import Row, read_table
from .templates import Template, own_or, shot_rows, shots_text

log = logging.getLogger(__name__)

_FORMAT = (
    "Think first if it helps. The last thing in your answer must be the whole program in one "
    "block:\n```python\n...\n```\n"
)
# By what is asked for: to complete a function, to write one, to write a program.
PROMPTS = {
    "fenced": {
        "completion": "Complete this Python function.\n```python\n{prefix}\n```\n" + _FORMAT,
        "function": "{question}\n\nWrite it in Python. {tests}" + _FORMAT,
        "program": "{question}\n\nWrite a Python program that reads from standard input and prints "
        "to standard output. " + _FORMAT,
    },
    "mbpp": dict.fromkeys(
        ("completion", "function", "program"),
        "You write Python well. Your task: {question}\n{tests}[BEGIN]\n",
    ),
    "plain": dict.fromkeys(("completion", "function", "program"), "{question}"),
}
FIELDS = ("question", "tests", "prefix")


@dataclass(frozen=True, kw_only=True)
class CodeConfig:
    """Programs that are tested."""

    template: Literal["fenced", "mbpp", "plain"] = "fenced"
    """fenced: asks in words for one fenced block; mbpp: question, tests and the marker [BEGIN],
    answered up to [DONE]; plain: the question alone, such as HumanEval's code, to be continued"""
    prompt_template: str = ""
    """your own prompt, with {question}, {tests} and {prefix}: the text, or a file whose name ends
    in .txt; answers are read as `template` says"""
    shots: str = ""
    """examples with their solutions before each prompt: a data file, or a JSON list of objects"""
    shown_tests: int = 3
    """how many of the assert lines a prompt shows, as MBPP does, whose questions do not name the
    function; check functions and programs' inputs are never shown"""
    unfenced: bool = False
    """accept a completion without any fenced block as the program; with the templates mbpp and
    plain it always is"""
    reward: Literal["all", "fraction"] = "all"
    """all: 1 if every test passes, else 0, and the first failure ends it; fraction: the share of
    the tests passed"""
    time_limit: float = 6.0
    """seconds for loading the snippet and for each test, where the data names no limit"""
    total_time_limit: float = 60.0
    """seconds for all tests of a completion; tests that are not reached fail"""
    memory_mb: int = 1024
    """address space of each process"""
    disk_mb: int = 64
    """size of the scratch disk"""
    processes: int = 32
    """processes and threads a snippet may have at a time"""
    output_kb: int = 1024
    """what a program may print"""
    packages: bool = False
    """let snippets and tests import the packages installed beside dlm_fast, such as numpy, which
    some data sets' tests need; else the standard library alone"""
    workers: int = 0
    """completions tested at a time; 0: one per core this process may use"""
    isolation: Literal["auto", "bubblewrap", "namespaces", "user", "process"] = "auto"
    """auto: the strongest that works here (`dlm-fast info` names it); the last two leave ways to
    files and network"""
    columns: dict[str, str] = field(default_factory=dict)
    """columns of a data file that hold question, tests and the further fields, where it names
    them otherwise than the usual sets do"""

    def __post_init__(self) -> None:
        choices = {
            "template": tuple(PROMPTS),
            "reward": ("all", "fraction"),
            "isolation": ("auto", *MODES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"code.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name in ("memory_mb", "disk_mb", "processes", "output_kb"):
            if getattr(self, name) < 1:
                raise ValueError(f"code.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("shown_tests", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"code.{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.time_limit <= self.total_time_limit < float("inf"):
            raise ValueError(
                "code.time_limit and code.total_time_limit must satisfy 0 < time_limit <= "
                f"total_time_limit, got {self.time_limit} and {self.total_time_limit}"
            )


@dataclass(frozen=True)
class Code:
    """The task; `tasks.get("code", reward="fraction")` makes one.

    >>> task = Code(CodeConfig())
    >>> example = {"question": "Write double(x).", "tests": ["assert double(4) == 8"]}
    >>> task.score("```python\\ndef double(x):\\n    return 2 * x\\n```", example).reward
    1.0
    """

    config: CodeConfig = field(default_factory=CodeConfig)
    name: str = "code"
    thread_safe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # read and checked when the task is made, not at the first prompt of a run
        self._template("function").check(FIELDS)
        _ = self._shots, self._places

    def load(self, path: str | None, split: str) -> Sequence[Example]:
        """Problems of a file; the columns of HumanEval, MBPP and TraceRL's data are known."""
        check_split(split)
        if path is None:
            raise ValueError(
                "task code generates no data: give a JSONL, CSV or parquet file whose rows have "
                "question and tests, or the columns of HumanEval or MBPP"
            )
        return [self.example(row) for row in read_table(path)]

    def example(self, row: Row) -> Example:
        """The problem of a row."""
        return example_of(row, self.config.columns)

    def prompt(self, example: Example) -> str:
        """The question in the template's words, behind the few-shot examples."""
        return self._shots + self._ask(example)

    def demonstration(self, example: Example) -> str:
        """The example's own solution in the template's format."""
        solution = example.get("solution")
        if not isinstance(solution, str) or not solution.strip():
            raise ValueError(
                "this code example has no demonstration: it needs a column solution (or "
                "canonical_solution, or code)"
            )
        if self.config.template == "mbpp":
            return f"{solution.rstrip()}\n{DONE}"
        if self.config.template == "plain":
            return solution.removeprefix(example.get("prefix", ""))
        trace = f"{example['trace']}\n\n" if example.get("trace") else ""
        return f"{trace}```python\n{solution.rstrip()}\n```"

    def score(self, completion: str, example: Example) -> Score:
        """1 for a program that passes every test (or the fraction passed), else 0."""
        field_of(example, "tests", self.name)
        tests = tests_of(example)
        unfenced = self.config.unfenced or self.config.template in ("mbpp", "plain")
        code = find_code(completion, unfenced=unfenced)
        if code is None:
            return Score(0.0, False, {"answered": False, "passed": 0.0, "timed_out": False})
        with self._places:
            outcomes = self._check(code, tests, self._limits(example))
        passed = sum(outcome.passed for outcome in outcomes) / len(outcomes)
        correct = all(outcome.passed for outcome in outcomes)
        failed = [outcome.reason for outcome in outcomes if not outcome.passed]
        detail: dict[str, Any] = {
            "answered": True,
            "passed": passed,
            "timed_out": "time limit" in failed,
            "answer": normal_code(code),
        }
        if failed:
            detail["reason"] = failed[0]
        return Score(
            passed if self.config.reward == "fraction" else float(correct), correct, detail
        )

    def score_many(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Score]:
        """As `score`, as many at a time as there are workers."""
        with ThreadPoolExecutor(self._workers) as pool:
            pairs = zip(completions, examples, strict=True)
            jobs = [pool.submit(self.score, *pair) for pair in pairs]
            return [job.result() for job in jobs]

    def metrics(self, scores: Sequence[Score]) -> dict[str, float]:
        """`answered`: with a program; `passed`: tests passed; `timed_out`: over the time limit.

        Where the first failure ends the tests (`reward="all"`), those not run count as failed.
        """
        return mean_details(scores, "answered", "passed", "timed_out")

    @cached_property
    def _workers(self) -> int:
        if self.config.workers:
            return self.config.workers
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    @cached_property
    def _places(self) -> threading.BoundedSemaphore:
        return threading.BoundedSemaphore(self._workers)

    @cached_property
    def _mode(self) -> str:
        mode = working_mode(self.config.isolation)
        if mode in ("user", "process"):
            log.warning("the sandbox for code is weak here (%s)", meaning(mode))
        return mode

    @cached_property
    def _shots(self) -> str:
        rows = shot_rows(self.config.shots, "code.shots")
        examples = [example_of(row, self.config.columns) for row in rows]
        return shots_text((self._ask(e), self.demonstration(e)) for e in examples)

    def _template(self, kind: str) -> Template:
        text = PROMPTS[self.config.template][kind]
        return own_or(self.config.prompt_template, text, "code.prompt_template")

    def _ask(self, example: Example) -> str:
        question = field_of(example, "question", self.name)
        tests = tests_of(example)
        shown = ""
        if isinstance(tests, ProgramTests):
            kind = "program"
        elif tests.prefix and tests.open_names:
            kind = "completion"
        else:
            kind = "function"
            shown = "\n".join(tests.tests[: self.config.shown_tests])
        values = {
            "question": question.rstrip("\n") if self.config.template != "plain" else question,
            "tests": f"It must pass these tests:\n{shown}\n\n" if shown else "",
            "prefix": tests.prefix.rstrip("\n"),
        }
        return self._template(kind).fill(values)

    def _limits(self, example: Example) -> Limits:
        config = self.config
        seconds = float(example.get("time_limit") or config.time_limit)
        return Limits(
            seconds=seconds,
            total_seconds=max(config.total_time_limit, seconds),
            memory_bytes=config.memory_mb << 20,
            disk_bytes=config.disk_mb << 20,
            processes=config.processes,
            output_bytes=config.output_kb << 10,
            packages=config.packages,
        )

    def _check(
        self, code: str, tests: FunctionTests | ProgramTests, limits: Limits
    ) -> list[Outcome]:
        stop = self.config.reward == "all"
        if isinstance(tests, ProgramTests):
            return check_programs(code, tests, limits, self._mode, stop_at_failure=stop)
        return check_functions(code, tests, limits, self._mode, stop_at_failure=stop)
