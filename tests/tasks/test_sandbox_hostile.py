"""Hostile snippets score zero within their time, and leave no process, file or open file behind."""

import os
import socket
import tempfile

import pytest
from hostile_snippets import NEEDLE, SNIPPETS
from sandbox_help import ADD, SHORT, mode_or_skip, processes_of

from dlm_fast.tasks.sandbox.verdicts import check_functions


@pytest.fixture
def nothing_is_left(tmp_path, monkeypatch):
    """After the test: no process of the sandbox, no file of it, no further open file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mode_or_skip()
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert not processes_of(os.getpid())
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
    outcomes = check_functions(source, ADD, SHORT, mode_or_skip(), stop_at_failure=False)
    assert [outcome.passed for outcome in outcomes] == [False, False], outcomes
