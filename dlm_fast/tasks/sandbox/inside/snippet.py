"""Runs a snippet: as functions that the tests' process calls, or as a program with input."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

from .link import OF_SNIPPET, Link
from .wire import WireError


def serve(spec: dict[str, Any], read_fd: int, write_fd: int) -> None:
    """Answers the tests' process until it leaves. `spec` has prefix and source, two texts."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses look their module up by name

    def load() -> list[str]:
        _execute(spec["prefix"], spec["source"], module.__dict__)
        return [name for name in list(module.__dict__) if isinstance(name, str)]

    link = Link(read_fd, write_fd, OF_SNIPPET)
    link.show(load)
    link.show(module)
    try:
        link.serve()
    except (EOFError, OSError, WireError):
        os._exit(0)  # the tests have ended


def run(spec: dict[str, Any]) -> None:
    """Runs the source as the main program, standard input and output being the test's."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["solution.py"]
    _execute(spec["prefix"], spec["source"], module.__dict__)


def _execute(prefix: str, source: str, namespace: dict[str, Any]) -> None:
    """Prefix, then source; where the source alone is no program, it goes on with the prefix."""
    try:
        code = compile(source, "solution.py", "exec", dont_inherit=True)
    except SyntaxError:
        if not prefix:
            raise
        code = compile(prefix + source, "solution.py", "exec", dont_inherit=True)
        prefix = ""
    if prefix:
        exec(compile(prefix, "prefix.py", "exec", dont_inherit=True), namespace)
    exec(code, namespace)
