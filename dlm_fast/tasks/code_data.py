"""Rows of code data sets as examples: own form, HumanEval's, MBPP's and TraceRL's columns.

An example has `question` and `tests`, and where they are there `prefix`, `setup`, `entry_point`,
`solution`, `time_limit` and `trace`. Tests are texts of Python, or objects with `input` and
`output` for a program that reads and prints.
"""

from __future__ import annotations

import ast
import json
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .base import Example
from .sandbox.verdicts import FunctionTests, ProgramTests
from .table import Row, pick_fields, shorten

REQUIRED: dict[str, tuple[str, ...]] = {"question": ("question", "text", "problem", "prompt")}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "tests": ("tests", "test_list", "test"),
    "inputs": ("test_input", "inputs"),
    "outputs": ("test_output", "outputs"),
    "method": ("test_method",),
    "time_limit": ("test_time_limit", "time_limit"),
    "prefix": ("prefix",),
    "setup": ("setup", "test_setup_code", "test_imports"),
    "entry_point": ("entry_point",),
    "solution": ("solution", "canonical_solution", "code"),
}
METHODS = ("function", "stdio")


def example_of(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """The example of a row; ValueError with file and line for one that cannot be used."""
    fields = _fields(row, columns)
    try:
        return _example(fields, row)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def tests_of(example: Example) -> FunctionTests | ProgramTests:
    """What the sandbox runs; ValueError for an example without usable tests."""
    tests = example.get("tests")
    prefix = _text(example, "prefix")
    if not isinstance(tests, list | tuple) or not tests:
        raise ValueError(
            "a code example's tests must be a list of Python texts or of objects with input and "
            f"output, got {shorten(tests)}"
        )
    if all(isinstance(test, str) for test in tests):
        setup = _text(example, "setup")
        texts, entry = list(tests), _text(example, "entry_point")
        names = stubs(prefix) | ({entry} if entry else set())
        imports = "".join(f"import {name}\n" for name in _library_names([setup, *texts]))
        setup = imports + setup
        return FunctionTests(tests=texts, setup=setup, prefix=prefix, open_names=sorted(names))
    pairs = [_pair(test) for test in tests]
    return ProgramTests(
        inputs=[given for given, _ in pairs], outputs=[wanted for _, wanted in pairs], prefix=prefix
    )


@lru_cache(maxsize=4096)
def stubs(prefix: str) -> frozenset[str]:
    """Functions of a prefix that have no body yet, which a snippet is asked to write."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(prefix).body
    except (SyntaxError, ValueError):
        return frozenset()
    functions = (node for node in body if isinstance(node, ast.FunctionDef))
    return frozenset(node.name for node in functions if all(map(_says_nothing, node.body)))


def _says_nothing(node: ast.stmt) -> bool:
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, ast.Pass | ast.Raise)


def _fields(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    lowered = {str(column).lower() for column in row.values}
    known = dict(REQUIRED)
    for name, names in OPTIONAL.items():
        if name in columns or any(each in lowered for each in names):
            known[name] = names
    unknown = [name for name in columns if name not in known]
    if unknown:
        known |= OPTIONAL  # so that the error lists every field
    fields = pick_fields(row, known, columns, "code")
    return {name: _from_json(value) for name, value in fields.items() if value not in (None, "")}


def _from_json(value: Any) -> Any:
    # CSV files and some published sets hold lists and objects as texts.
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _example(fields: dict[str, Any], row: Row) -> dict[str, Any]:
    example: dict[str, Any] = {"question": _text(fields, "question"), "tests": _tests(fields)}
    if not example["question"].strip():
        raise ValueError("the question is empty")
    for name in ("prefix", "entry_point", "solution"):
        if name in fields:
            example[name] = _text(fields, name)
    if isinstance(fields.get("setup"), list):
        example["setup"] = "\n".join(map(str, fields["setup"]))
    elif "setup" in fields:
        example["setup"] = _text(fields, "setup")
    if "time_limit" in fields:
        example["time_limit"] = _seconds(fields["time_limit"])
    if row.values.get("trace"):
        example["trace"] = str(row.values["trace"])
    if "entry_point" in example and isinstance(fields.get("tests"), str):
        _complete_humaneval(example)
    tests_of(example)
    return example


def _tests(fields: dict[str, Any]) -> list[Any]:
    tests, method = fields.get("tests"), fields.get("method")
    if method not in (None, *METHODS):
        raise ValueError(f"test_method must be one of {', '.join(METHODS)}, got {shorten(method)}")
    if isinstance(tests, dict) and "inputs" in tests:
        if tests.get("fn_name"):
            raise ValueError("tests with fn_name are not understood; write them as assert lines")
        fields = fields | {name: tests.get(name) for name in ("inputs", "outputs")}
        tests = None
    if method == "stdio" or (tests is None and "inputs" in fields):
        inputs, outputs = fields.get("inputs"), fields.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            raise ValueError(
                "tests of a program need lists of inputs and outputs, "
                f"got {shorten(inputs)} and {shorten(outputs)}"
            )
        if len(inputs) != len(outputs) or not inputs:
            raise ValueError(f"{len(inputs)} inputs for {len(outputs)} outputs")
        return [{"input": a, "output": b} for a, b in zip(inputs, outputs, strict=True)]
    if isinstance(tests, str):
        return [tests]
    if not isinstance(tests, list) or not tests:
        raise ValueError(
            "no tests: a row needs tests (or test_list), a list of assert lines or of objects "
            f"with input and output, or HumanEval's test; got {shorten(tests)}"
        )
    return tests


def _complete_humaneval(example: dict[str, Any]) -> None:
    """HumanEval's columns: the prompt is code, the test a function `check(candidate)`."""
    test, entry = example["tests"][0], example["entry_point"]
    if not entry.isidentifier():
        raise ValueError(f"entry_point must be the name of a function, got {shorten(entry)}")
    if "def check" in test:
        example["tests"] = [f"{test}\n\ncheck({entry})\n"]
    if "prefix" not in example and entry in stubs(example["question"]):
        example["prefix"] = example["question"]
        if "solution" in example:
            example["solution"] = example["question"] + example["solution"]


def _library_names(texts: list[str]) -> list[str]:
    """Modules of the standard library that tests use as `math.isclose` without importing them.

    They must be Python's. Left to the snippet, whose import they were written to count on, it could
    bring an `isclose` of its own.
    """
    uses = [_names_in(text) for text in texts]
    bases = frozenset().union(*(bases for bases, _ in uses))
    others = frozenset().union(*(others for _, others in uses))
    return sorted((bases & sys.stdlib_module_names) - others)


@lru_cache(maxsize=4096)
def _names_in(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of a test that attributes are asked of, and names that stand for something else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"a test is not valid Python ({error}): {shorten(text)}") from None
    bases = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    return (
        frozenset(node.id for node in names if id(node) in bases),
        frozenset(node.id for node in names if id(node) not in bases),
    )


def _pair(test: Any) -> tuple[str, str]:
    if not isinstance(test, Mapping) or "input" not in test or "output" not in test:
        raise ValueError(
            "a code example's tests must all be Python texts, or all objects with input and "
            f"output; got {shorten(test)}"
        )
    return _lines(test["input"]), _lines(test["output"])


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shorten(value)}")
    return value


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < 3600:
        raise ValueError(
            f"a time limit must be a number of seconds up to an hour, got {shorten(value)}"
        )
    return seconds
