"""Runs tests against a snippet that lives in another process, and reports each verdict.

Reports are lines on a pipe that the snippet's process does not have: `loaded`, then for each test
`pass` or `fail REASON`. `lost REASON` fails all that are left, `broken REASON` says that the tests
themselves do not run.
"""

from __future__ import annotations

import builtins
import os
import types
from collections.abc import Iterator
from typing import Any

from .link import LOAD, NAMESPACE, OF_TESTS, Link
from .wire import NotPlain

MAX_REASON = 200


def judge(spec: dict[str, Any], read_fd: int, write_fd: int, report_fd: int) -> None:
    """`spec` has prefix, setup and tests (texts), and open_names: what of the prefix is a stub."""

    def report(verdict: str, error: BaseException | None = None) -> None:
        reason = f" {type(error).__name__}: {error}"[:MAX_REASON] if error else ""
        line = verdict + reason.encode("ascii", "backslashreplace").decode().replace("\n", " ")
        os.write(report_fd, line.encode() + b"\n")

    link = Link(read_fd, write_fd, OF_TESTS)
    space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    try:
        setup, *tests = [_compile(text) for text in (spec["setup"], *spec["tests"])]
        _run_prefix(spec["prefix"], space)
    except BaseException as error:
        return report("broken", error)
    try:
        _fetch(link, space, [setup, *tests], set(spec["open_names"]))
        exec(setup, space)
    except BaseException as error:
        return report("broken" if _is_own_fault(error, link) else "lost", error)
    report("loaded")
    for test in tests:
        try:
            exec(test, space)
            if link.broken:  # a test that forgives every error would forgive a snippet that left
                raise EOFError("the snippet's process has left")
            report("pass")
        except BaseException as error:
            report("broken" if _is_own_fault(error, link) else "fail", error)
        if link.broken:  # what is left gets a new process
            return None
    return None


def _compile(text: str) -> types.CodeType:
    return compile(text, "tests.py", "exec", dont_inherit=True)


def _run_prefix(prefix: str, space: dict[str, Any]) -> None:
    try:
        code = _compile(prefix)
    except SyntaxError:  # a beginning that only the snippet completes
        return
    exec(code, space)


def _fetch(
    link: Link, space: dict[str, Any], codes: list[types.CodeType], open_names: set[str]
) -> None:
    """Names of the snippet that the tests use. What the prefix defines is the tests' own.

    So are the built-in functions: tests say `sorted` or `set` and mean Python's, not the snippet's.
    """
    own = {name for name in space if name not in open_names}
    own.update(name for name in dir(builtins) if name not in open_names)
    names = link.request(LOAD, "call")
    offered = (
        {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    )
    for name in sorted({name for code in codes for name in _names(code)} & offered - own):
        space[name] = link.request(NAMESPACE, "get", (name,))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_own_fault(error: BaseException, link: Link) -> bool:
    """Whether no snippet could pass: the tests miss a module, or hand over what cannot travel."""
    return isinstance(error, ImportError | NotPlain) and error is not link.raised
