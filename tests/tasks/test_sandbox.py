"""The sandbox: verdicts in each isolation, hostile programs, broken surroundings, cleaning up."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest
from hostile_snippets import SNIPPETS
from sandbox_help import ADD, LIMITS, SHORT, mode_or_skip, passed, processes_of

from dlm_fast import tasks
from dlm_fast.cli.info import facts
from dlm_fast.tasks.sandbox import child, isolation, leftovers
from dlm_fast.tasks.sandbox.isolation import SandboxError
from dlm_fast.tasks.sandbox.verdicts import (
    FunctionTests,
    ProgramTests,
    check_functions,
    check_programs,
    working_mode,
)

SUM = ProgramTests(inputs=["1 2", "5 -9"], outputs=["3", "-4\n"])


@pytest.fixture(params=isolation.MODES)
def mode(request):
    return mode_or_skip(request.param)


def test_right_and_wrong_in_every_isolation(mode):
    right, wrong = "def add(a, b): return a + b", "def add(a, b): return 3"
    assert passed(check_functions(right, ADD, LIMITS, mode)) == [True, True]
    assert passed(check_functions(wrong, ADD, LIMITS, mode)) == [True, False]
    program = "print(sum(map(int, input().split())))"
    assert passed(check_programs(program, SUM, LIMITS, mode)) == [True, True]
    assert passed(check_programs("print(3)", SUM, LIMITS, mode)) == [True, False]


# What is safe where neither processes nor files of this user are out of reach.
MILD = (
    "os._exit", "everything is equal", "printing a verdict", "closing every open file",
    "a directory that nobody may enter", "a daemon", "endless loop",
    "signals ignored", "threads that never end", "the stack",
)  # fmt: skip


@pytest.mark.parametrize("name", MILD)
def test_the_weakest_isolation_cleans_up_too(name, tmp_path, monkeypatch):
    mode = mode_or_skip("process")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert passed(check_functions(SNIPPETS[name], ADD, SHORT, mode)) == [False, False]
    assert not processes_of(os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_test_that_forgives_errors_forgives_no_snippet_that_left():
    forgiving = FunctionTests(tests=["try:\n    f()\nexcept Exception:\n    pass"])
    for body, passes in (("raise ValueError", True), ("import os; os._exit(0)", False)):
        source = f"def f(): {body}"
        [outcome] = check_functions(source, forgiving, LIMITS, mode_or_skip())
        assert outcome.passed == passes
        assert outcome.reason == ("" if passes else "EOFError: the snippet's process has left")


PROGRAMS = ("exit", "endless loop", "endless output", "a daemon", "fork bomb", "invalid UTF-8",
            "writing every open file", "killing the process group", "the stack", "NUL",
            "becoming another program", "stopping itself")  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs_fail(name):
    source = SNIPPETS[name] + ("\nadd(1, 2)" if name == "the stack" else "")
    [outcome, _] = check_programs(source, SUM, SHORT, mode_or_skip())
    assert not outcome.passed
    if name == "endless output":
        assert outcome.reason.startswith("printed more than")


def test_a_program_may_not_fail_at_its_end():
    source = "print(sum(map(int, input().split())))\nraise SystemExit(2)"
    [outcome, _] = check_programs(source, SUM, LIMITS, mode_or_skip())
    assert outcome.reason == "ended with status 2"


def test_a_daemon_does_not_delay_the_verdict():
    source = SNIPPETS["a daemon"].replace("600", "60") + "print(3)"
    [outcome] = check_programs(
        source, ProgramTests(inputs=["x"], outputs=["3"]), LIMITS, mode_or_skip()
    )
    assert outcome.passed


TRAINER = """
import sys
from dlm_fast.tasks.sandbox.verdicts import FunctionTests, check_functions, working_mode
from dlm_fast.tasks.sandbox.child import Limits
limits = Limits(seconds=300, total_seconds=300, memory_bytes=1 << 29, disk_bytes=1 << 22,
                processes=16, output_bytes=1 << 20)
print("start", flush=True)
source = "import os\\nos.fork()\\nwhile True: pass"
check_functions(source, FunctionTests(tests=["f()"]), limits, sys.argv[1])
"""


def test_the_sandbox_ends_with_the_trainer():
    mode = mode_or_skip()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, mode], stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert trainer.stdout.readline() == b"start\n"

    def wait_for(wanted):
        deadline = time.monotonic() + 60
        while bool(processes_of(trainer.pid)) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(processes_of(trainer.pid)) == wanted

    assert wait_for(True)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    assert wait_for(False)


@pytest.mark.parametrize(
    ("command", "message"),
    [(["no such program"], "No such file"), (["false"], "ended before it was ready")],
)
def test_a_machine_without_processes_is_a_failure_of_the_checker(command, message, monkeypatch):
    mode_or_skip()
    task = tasks.get("code")
    example = {"question": "x", "tests": ["assert f() == 1"]}
    answer = "```python\ndef f(): return 1\n```"
    assert task.score(answer, example).correct
    monkeypatch.setattr(isolation, "command", lambda *_: command)
    with pytest.raises(SandboxError, match=message):
        task.score(answer, example)
    [score] = tasks.score_batch(task, [answer], [example])
    assert message in score.detail["checker_error"]
    with pytest.raises(tasks.CheckerError, match="failed on all 8"):
        tasks.score_batch(task, [answer] * 8, [example] * 8)


def test_no_space_for_scratch_is_a_failure_of_the_checker(monkeypatch, tmp_path):
    mode = mode_or_skip("process")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(SandboxError, match="has space"):
        check_functions("", ADD, LIMITS, mode)


def test_no_further_files_is_a_failure_of_the_checker(monkeypatch):
    mode = mode_or_skip()

    def no_file(*_):
        raise OSError(24, "Too many open files")

    for name in ("pipe", "memfd_create"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no_file)
            with pytest.raises(SandboxError, match="Too many open files"):
                check_functions("", ADD, LIMITS, mode)


def test_a_sandbox_that_does_not_start_in_time(monkeypatch):
    mode_or_skip()
    monkeypatch.setattr(child, "START_SECONDS", 0.05)
    monkeypatch.setattr(isolation, "command", lambda *_: ["sleep", "100"])
    with pytest.raises(SandboxError, match="not ready after"):
        check_functions("", ADD, LIMITS, "process")


def test_no_working_isolation_is_named(monkeypatch):
    monkeypatch.setattr(isolation, "candidates", list)
    working_mode.cache_clear()
    try:
        with pytest.raises(SandboxError, match="no sandbox works here: it needs Linux"):
            working_mode()
        line = facts()["in force"]["isolation of code"]
    finally:
        working_mode.cache_clear()
    assert line.startswith("none: no sandbox works here")


def test_info_says_which_isolation_is_in_force():
    line = facts()["in force"]["isolation of code"]
    assert line == isolation.meaning(mode_or_skip())


def test_trees_are_removed_whatever_they_are(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    (tree / "broken").symlink_to("nowhere")
    os.mkfifo(tree / "pipe")
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_text("x")
    (tree / "a" / ".1.removed").mkdir()
    (tree / ".2.removed").mkdir()
    for path in (tree / "a" / "b", tree / "a", tree):
        path.chmod(0)
    here = os.getcwd()
    tree.chmod(stat.S_IRWXU)
    os.chdir(tree)
    try:
        for _ in range(30):  # longer than a path may be
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(here)
    leftovers.remove_tree(str(tree))
    assert not tree.exists()
    assert (outside / "kept").read_text() == "x"


def test_a_child_born_while_processes_are_listed_is_found(monkeypatch):
    """Its parent stands in the list and has ended at the look; the child comes in a later list."""
    lists = iter([[10, 30], [11, 30], [11, 30], [30], [30]])
    environments = {30: b"", 11: f"{leftovers.MARK}=1-2".encode()}
    monkeypatch.setattr(leftovers, "_processes", lambda: next(lists))
    monkeypatch.setattr(leftovers, "_environment", lambda pid: environments.get(pid, b""))
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    leftovers.kill_marked("1-2")
    assert killed == [11, 11] and list(lists) == [[30]]
