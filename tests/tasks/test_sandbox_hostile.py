"""Hostile snippets score zero within their time, and leave no process, file or open file behind."""

import os
import socket
import tempfile

import pytest
from hostile_snippets import NEEDLE, SNIPPETS

from dlm_fast.tasks.sandbox import leftovers
from dlm_fast.tasks.sandbox.child import Limits
from dlm_fast.tasks.sandbox.isolation import SandboxError
from dlm_fast.tasks.sandbox.verdicts import (
    FunctionTests,
    check_functions,
    working_mode,
)

LIMITS = Limits(
    seconds=1, total_seconds=20, memory_bytes=1 << 29, disk_bytes=1 << 22, processes=16,
    output_bytes=1 << 20,
)  # fmt: skip
ADD = FunctionTests(tests=["assert add(1, 2) == 3", "assert add(5, -9) == -4"])


def mode_or_skip(wanted="auto"):
    try:
        return working_mode(wanted)
    except SandboxError as error:
        pytest.skip(str(error))


def marked_processes():
    mark = f"{leftovers.MARK}={os.getpid()}-".encode()
    return [pid for pid in leftovers._processes() if mark in leftovers._environment(pid)]


@pytest.fixture
def nothing_is_left(tmp_path, monkeypatch):
    """After the test: no process of the sandbox, no file of it, no further open file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mode_or_skip()
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert not marked_processes()
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def port():
    """A port on which somebody listens outside of the sandbox."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_hostile_snippet_fails_every_test(name, nothing_is_left, port):
    source = SNIPPETS[name].replace("PORT", str(port)).replace("NEEDLE", NEEDLE)
    outcomes = check_functions(source, ADD, LIMITS, mode_or_skip(), stop_at_failure=False)
    assert [outcome.passed for outcome in outcomes] == [False, False], outcomes
