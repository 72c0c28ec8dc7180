"""Verdicts on snippets: made here or in a process that no snippet ever ran in.

Functions: one process holds the snippet, another the tests. The tests call the snippet's functions
over a pipe of plain values, so that neither the interpreter, the files nor the report of the tests
are within its reach. Programs: the snippet reads and prints, the comparison happens here.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import isolation
from .child import Child, Limits, file_of, wait_readable
from .isolation import SandboxError

_READ = 1 << 16


class _Clock:
    """The time of one snippet: what its tests take, without the start of processes."""

    def __init__(self, limits: Limits) -> None:
        self.left = limits.total_seconds
        self._seconds = limits.seconds

    @contextlib.contextmanager
    def test(self) -> Iterator[float]:
        """The deadline of a test that begins now."""
        begun = time.monotonic()
        try:
            yield begun + min(self._seconds, self.left)
        finally:
            self.left -= time.monotonic() - begun


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    passed: bool
    reason: str = ""
    """why it failed; text of the snippet's may stand in it"""


@dataclass(frozen=True, kw_only=True)
class FunctionTests:
    """Tests in Python that call what the snippet defines."""

    tests: Sequence[str]
    """each passes if it runs to its end"""
    setup: str = ""
    """runs before them, in their process, the snippet's names being there"""
    prefix: str = ""
    """stands before the snippet; complete functions in it are the tests' own as well"""
    open_names: Sequence[str] = ()
    """names that are the snippet's although the prefix or Python defines them"""


@dataclass(frozen=True, kw_only=True)
class ProgramTests:
    """Inputs and the outputs they should have, up to white space."""

    inputs: Sequence[str]
    """what stands on standard input, test by test"""
    outputs: Sequence[str]
    """what should be printed"""
    prefix: str = ""
    """stands before the snippet"""


def check_functions(
    source: str, tests: FunctionTests, limits: Limits, mode: str, *, stop_at_failure: bool = True
) -> list[Outcome]:
    """One outcome per test. SandboxError if the tests themselves cannot run."""
    clock = _Clock(limits)
    outcomes: list[Outcome] = []

    def done() -> bool:
        stop = stop_at_failure and not all(outcome.passed for outcome in outcomes)
        return stop or len(outcomes) == len(tests.tests) or clock.left <= 0

    while not done():
        # Each round settles at least one test: a snippet that hangs or leaves gets a new process.
        for outcome in _session(source, tests, len(outcomes), limits, mode, clock):
            outcomes.append(outcome)
            if done():
                break
    left = len(tests.tests) - len(outcomes)
    return outcomes + [Outcome(False, "not run")] * left


def check_programs(
    source: str, tests: ProgramTests, limits: Limits, mode: str, *, stop_at_failure: bool = True
) -> list[Outcome]:
    """One outcome per test, each from a process of its own."""
    clock = _Clock(limits)
    outcomes: list[Outcome] = []
    for given, wanted in zip(tests.inputs, tests.outputs, strict=True):
        stop = stop_at_failure and not all(outcome.passed for outcome in outcomes)
        if stop or clock.left <= 0:
            outcomes.append(Outcome(False, "not run"))
            continue
        outcomes.append(_run_program(source, tests.prefix, given, wanted, limits, mode, clock))
    return outcomes


@lru_cache(maxsize=len(isolation.MODES) + 1)
def working_mode(wanted: str = "auto") -> str:
    """The strongest mode that gives a right verdict here, or the one that is wanted.

    SandboxError says what fails.
    """
    limits = Limits(
        seconds=20, total_seconds=60, memory_bytes=1 << 30, disk_bytes=1 << 24, processes=16,
        output_bytes=1 << 16,
    )  # fmt: skip
    # Both processes must still find the library.
    tests = FunctionTests(tests=["from fractions import Fraction; assert double(2) == Fraction(4)"])
    source = "import collections, decimal\ndef double(x): return decimal.Decimal(2 * x)"
    reasons = []
    for mode in isolation.candidates() if wanted == "auto" else [wanted]:
        try:
            outcome = check_functions(source, tests, limits, mode)[0]
        except SandboxError as error:
            reasons.append(str(error))
            continue
        if outcome.passed:
            return mode
        reasons.append(f"mode {mode}: {outcome.reason}")
    raise SandboxError(f"no sandbox works here: {'; '.join(reasons) or 'it needs Linux'}")


def _session(
    source: str, tests: FunctionTests, first: int, limits: Limits, mode: str, clock: _Clock
) -> Iterator[Outcome]:
    """Outcomes from test `first` on, until the processes of this session are of no more use."""
    rest = list(tests.tests[first:])
    common: dict[str, Any] = {"prefix": tests.prefix}
    common["limits"] = limits.resources(mode, limits.total_seconds)
    snippet_spec = common | {"role": "functions", "source": source}
    tests_spec = common | {
        "role": "tests",
        "setup": tests.setup,
        "tests": rest,
        "open_names": list(tests.open_names),
    }
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as ours:
            # Closed here as soon as the children have them, so that each sees the other leave.
            questions_read, questions = _pipe(ours)
            answers_read, answers = _pipe(ours)
            ends = (questions_read, answers), (answers_read, questions)
            snippet = stack.enter_context(Child(snippet_spec, mode, limits, link=ends[0]))
            judge = stack.enter_context(Child(tests_spec, mode, limits, link=ends[1]))
        snippet.await_ready()
        judge.await_ready()
        verdict = _next_verdict(judge, clock)
        if verdict != "loaded":
            reason = verdict.removeprefix("lost ").removeprefix("fail ")
            yield from [Outcome(False, reason)] * len(rest)
            return
        for number in range(len(rest)):
            verdict = _next_verdict(judge, clock)
            if verdict == _GONE and number > 0:
                return  # it left with the snippet's process, after its last verdict
            yield Outcome(verdict == "pass", verdict.removeprefix("pass").removeprefix("fail "))
            if verdict in (_TOO_LONG, _GONE):
                return


_TOO_LONG, _GONE = "fail time limit", "fail a process has ended"


def _next_verdict(judge: Child, clock: _Clock) -> str:
    try:
        with clock.test() as deadline:
            line = judge.reports.next(deadline)
    except TimeoutError:
        return _TOO_LONG
    if line is None:
        return _GONE
    if line.startswith("broken"):
        raise SandboxError(f"the tests do not run:{line.removeprefix('broken')}")
    return line


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    try:
        ends = os.pipe()
    except OSError as error:
        raise SandboxError(f"no pipe to a child process can be made: {error}") from None
    for fd in ends:
        stack.callback(os.close, fd)
    return ends


def _run_program(
    source: str, prefix: str, given: str, wanted: str, limits: Limits, mode: str, clock: _Clock
) -> Outcome:
    spec = {
        "role": "program",
        "prefix": prefix,
        "source": source,
        "limits": limits.resources(mode, limits.seconds),
    }
    with contextlib.ExitStack() as stack:
        stdin = file_of(given.encode("utf-8", "surrogatepass"))
        stack.callback(os.close, stdin)
        output, stdout = _pipe(stack)
        child = stack.enter_context(Child(spec, mode, limits, stdin=stdin, stdout=stdout))
        child.await_ready()
        with clock.test() as deadline:
            printed = _read_output(child, output, limits.output_bytes, deadline)
        if isinstance(printed, str):
            return Outcome(False, printed)
        status = child.process.returncode
    if status != 0:
        return Outcome(False, f"ended with status {status}")
    if printed.decode("utf-8", "replace").split() != wanted.split():
        return Outcome(False, "printed something else")
    return Outcome(True)


def _read_output(child: Child, output: int, limit: int, deadline: float) -> bytes | str:
    """All that was printed once the program has ended; a text says why there is no such thing."""
    data = bytearray()
    os.set_blocking(output, False)
    end = os.pidfd_open(child.process.pid)
    try:
        while True:
            # Asked before reading, so that nothing printed before the end is missed.
            ended = child.process.poll() is not None
            try:
                while len(data) <= limit:
                    data += os.read(output, _READ)
            except BlockingIOError:
                pass
            if len(data) > limit:
                return f"printed more than {limit} bytes"
            if ended:
                return bytes(data)
            if not wait_readable(end, deadline, output):
                return "time limit"
    finally:
        os.close(end)
