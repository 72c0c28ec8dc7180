"""The sandbox: each kind of isolation, what a snippet sees of the machine, broken surroundings."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest
from hostile_snippets import SNIPPETS

from dlm_fast import tasks
from dlm_fast.cli.info import facts
from dlm_fast.tasks.sandbox import child, isolation, leftovers
from dlm_fast.tasks.sandbox.child import Limits
from dlm_fast.tasks.sandbox.isolation import SandboxError
from dlm_fast.tasks.sandbox.verdicts import (
    FunctionTests,
    ProgramTests,
    check_functions,
    check_programs,
    working_mode,
)

LIMITS = Limits(
    seconds=20, total_seconds=60, memory_bytes=1 << 29, disk_bytes=1 << 22, processes=16,
    output_bytes=1 << 20,
)  # fmt: skip
SHORT = Limits(**(vars(LIMITS) | {"seconds": 1}))
ADD = FunctionTests(tests=["assert add(1, 2) == 3", "assert add(5, -9) == -4"])
SUM = ProgramTests(inputs=["1 2", "5 -9"], outputs=["3", "-4\n"])
SHUT_OFF = ("bubblewrap", "namespaces")


def mode_or_skip(wanted="auto"):
    try:
        return working_mode(wanted)
    except SandboxError as error:
        pytest.skip(f"no isolation {wanted} here: {error}")


@pytest.fixture(params=isolation.MODES)
def mode(request):
    return mode_or_skip(request.param)


def passed(outcomes):
    return [outcome.passed for outcome in outcomes]


def value_of(expression, mode, body="", **limits):
    """Whether an expression holds inside, as a snippet sees it."""
    source = f"import os, sys\ndef look():\n    return bool({expression})\n{body}"
    tests = FunctionTests(tests=["assert look()"])
    [outcome] = check_functions(source, tests, Limits(**(vars(LIMITS) | limits)), mode)
    assert outcome.passed or outcome.reason.startswith("AssertionError"), outcome
    return outcome.passed


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
    mark = f"{leftovers.MARK}={os.getpid()}-".encode()
    assert not [p for p in leftovers._processes() if mark in leftovers._environment(p)]
    assert not list(tmp_path.iterdir())


def test_what_a_snippet_sees(mode, monkeypatch):
    monkeypatch.setenv("SECRET", "abc")
    assert value_of("'SECRET' not in os.environ", mode)
    assert value_of("os.listdir('.') == [] and os.getcwd() == os.environ['HOME']", mode)
    assert value_of("open('file', 'w').write('x')", mode)
    assert value_of("os.path.samefile(os.readlink('file'), '/dev/null')", mode, LINK)
    assert value_of("not {'torch', 'dlm_fast', 'numpy'} & set(sys.modules)", mode)
    assert value_of("sys.stdin.read() == ''", mode)
    assert value_of("sys.flags.isolated and sys.flags.no_site", mode)


LINK = "os.symlink('/dev/null', 'file')"


def test_the_shut_off_modes_show_nothing_of_the_machine(tmp_path):
    mode = mode_or_skip()
    if mode not in SHUT_OFF:
        pytest.skip(f"isolation {mode} leaves files and processes in sight")
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert value_of(f"not os.path.exists({str(secret)!r})", mode)
    assert value_of(f"not os.path.exists({__file__!r})", mode)
    assert value_of("not os.path.exists('/proc/1') and not os.path.exists('/etc/passwd')", mode)
    assert value_of("os.getuid() == 1000", mode)
    for path in ("/", "/usr", sys.base_prefix, "/dev"):
        assert value_of(f"not os.access({path!r}, os.W_OK)", mode)
        body = "def fails(path):\n    try: os.mkdir(path + '/x')\n    except OSError: return True"
        assert value_of(f"fails({path!r})", mode, body)
    body = """
import ctypes
def fails():
    libc = ctypes.CDLL(None)
    return all((libc.unshare(0x10000000) or libc.unshare(0x20000), libc.mount(b'none', b'/tmp',
        b'tmpfs', 0, None), libc.umount2(b'/tmp', 2), libc.sethostname(b'x', 1)))
"""
    assert value_of("fails()", mode, body)
    body = "import socket\ndef names(): return [name for _, name in socket.if_nameindex()]"
    assert value_of("names() in ([], ['lo'])", mode, body)


def test_limits_hold(mode):
    body = (
        "def fails(f, *args):\n    try: f(*args)\n    except (MemoryError, OSError): return True\n"
    )
    assert value_of("fails(bytearray, 10**9)", mode, body)
    body += "def fill():\n    with open('f', 'wb') as file: file.write(bytes(10**7))\n"
    body += "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    assert value_of("fails(fill)", mode, body)
    body += "def files(): return [open('f' + str(i), 'w') for i in range(300)]\n"
    assert value_of("fails(files)", mode, body)
    assert value_of("__import__('resource').getrlimit(4) == (0, 0)", mode)


def test_the_scratch_disk_is_bounded_as_a_whole():
    mode = mode_or_skip()
    if mode not in SHUT_OFF:
        pytest.skip(f"isolation {mode} bounds single files alone")
    body = """
def total():
    count = 0
    try:
        while count < 64:
            with open(f'f{count}', 'wb') as file: file.write(bytes(1 << 20))
            count += 1
    except OSError: pass
    return count
"""
    assert value_of("total() < 8", mode, body)


def test_the_number_of_processes_is_bounded():
    mode = mode_or_skip()
    if mode == "process" or (mode == "bubblewrap" and os.geteuid() == 0):
        pytest.skip("processes of this user are not counted here")
    body = """
def forks():
    count = 0
    try:
        while count < 500:
            if os.fork() == 0:
                import time
                time.sleep(60)
            count += 1
    except OSError: pass
    return count
"""
    assert value_of("4 <= forks() <= 16", mode, body)


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
    mark = f"{leftovers.MARK}={trainer.pid}-".encode()

    def running():
        return [p for p in leftovers._processes() if mark in leftovers._environment(p)]

    def wait_for(wanted):
        deadline = time.monotonic() + 60
        while bool(running()) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(running()) == wanted

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
    assert line == isolation.MEANING[mode_or_skip()]


def test_bubblewraps_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(isolation, "bubblewrap", lambda: "/usr/bin/bwrap")
    link = tmp_path / "link"
    link.symlink_to("target")
    folder = tmp_path / "folder"
    folder.mkdir()
    words = isolation.bubblewrap_options((str(link), str(folder)), 1 << 20)
    pairs = list(zip(words, words[1:], words[2:], strict=False))
    assert {"--unshare-all", "--die-with-parent", "--new-session"} <= set(words)
    assert ("--symlink", "target", str(link)) in pairs
    assert ("--ro-bind", str(folder), str(folder)) in pairs
    assert ("--size", str(1 << 20), "--tmpfs") in pairs
    # a path below the scratch disk must be laid over it, and all of it locked at the end
    assert words.index("--tmpfs") < words.index("--ro-bind") < words.index("--remount-ro")
    assert "--bind" not in words
    command = isolation.command("bubblewrap", 1 << 20)
    assert command[0] == "/usr/bin/bwrap"
    python = command[command.index("--") + 1 :]
    assert python[:3] == [os.path.realpath(sys.executable), "-I", "-S"]
    monkeypatch.setattr(isolation, "bubblewrap", lambda: None)
    with pytest.raises(SandboxError, match="no bwrap"):
        isolation.command("bubblewrap", 1)


def test_candidates_by_user(monkeypatch):
    monkeypatch.setattr(isolation, "bubblewrap", lambda: "bwrap")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert isolation.candidates() == ["bubblewrap", "namespaces", "process"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert isolation.candidates() == ["namespaces", "bubblewrap", "user", "process"]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isolation.candidates() == []


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
