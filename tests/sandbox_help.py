"""What the tests of the sandbox share: limits, a trivial problem, isolations of this machine."""

import pytest

from dlm_fast.tasks.sandbox import leftovers
from dlm_fast.tasks.sandbox.child import Limits
from dlm_fast.tasks.sandbox.isolation import SandboxError
from dlm_fast.tasks.sandbox.verdicts import FunctionTests, check_functions, working_mode

LIMITS = Limits(
    seconds=20, total_seconds=60, memory_bytes=1 << 29, disk_bytes=1 << 22, processes=16,
    output_bytes=1 << 20,
)  # fmt: skip
SHORT = Limits(**(vars(LIMITS) | {"seconds": 0.6}))
ADD = FunctionTests(tests=["assert add(1, 2) == 3", "assert add(5, -9) == -4"])
SHUT_OFF = ("bubblewrap", "namespaces")


def mode_or_skip(wanted="auto"):
    """The isolation in force, or a certain one; the test is skipped where it does not work."""
    try:
        return working_mode(wanted)
    except SandboxError as error:
        pytest.skip(f"no isolation {wanted} here: {error}")


def passed(outcomes):
    return [outcome.passed for outcome in outcomes]


def value_of(expression, mode, body=""):
    """Whether an expression holds inside, as a snippet sees it."""
    source = f"import os, sys\ndef look():\n    return bool({expression})\n{body}"
    [outcome] = check_functions(source, FunctionTests(tests=["assert look()"]), LIMITS, mode)
    assert outcome.passed or outcome.reason.startswith("AssertionError"), outcome
    return outcome.passed


def processes_of(trainer):
    """Processes of any sandbox that a trainer with this process id has started."""
    mark = f"{leftovers.MARK}={trainer}-".encode()
    return [pid for pid in leftovers._processes() if mark in leftovers._environment(pid)]
