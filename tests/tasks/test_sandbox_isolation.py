"""What each isolation keeps a snippet from, and how bubblewrap is called."""

import os
import socket
import sys

import pytest
from sandbox_help import SHUT_OFF, mode_or_skip, value_of

from dlm_fast.tasks.sandbox import isolation
from dlm_fast.tasks.sandbox.inside import landlock
from dlm_fast.tasks.sandbox.isolation import SandboxError


@pytest.fixture(params=isolation.MODES)
def mode(request):
    return mode_or_skip(request.param)


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


@pytest.mark.parametrize("wanted", ["user", "process"])
def test_landlock_keeps_files_processes_and_tcp_away(wanted, tmp_path):
    mode = mode_or_skip(wanted)
    if landlock.version() < landlock.SCOPE_VERSION:
        pytest.skip(f"this kernel has version {landlock.version()} of Landlock")
    secret = tmp_path / "secret"
    secret.write_text("x")
    body = """
import socket
def fails(f, *args):
    try: f(*args)
    except OSError: return True
"""
    for call in ("open, {secret!r}", "open, {secret!r}, 'a'", "os.remove, {secret!r}",
                 "os.mkdir, {secret!r} + 'x'", "os.listdir, '/'", "open, '/proc/self/maps'",
                 "os.kill, {pid}, 0", "socket.create_connection, ('127.0.0.1', {port})",
                 "socket.create_server, ('127.0.0.1', 0)"):  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            filled = call.format(secret=str(secret), pid=os.getpid(), port=port)
            assert value_of(f"fails({filled})", mode, body), call
    assert value_of("open('/dev/null', 'w') and os.mkdir('x') is None", mode)
    assert secret.read_text() == "x"


def test_what_each_version_of_landlock_does_is_said(monkeypatch):
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert landlock.restrict([], [], "/") is False
    assert isolation.meaning("process").endswith("open to it")
    monkeypatch.setattr(landlock, "version", lambda: 1)
    assert isolation.meaning("user").endswith("Landlock 1 keeps it from files")
    monkeypatch.setattr(landlock, "version", lambda: 4)
    assert isolation.meaning("user").endswith("files and TCP")


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
    monkeypatch.setattr(isolation, "_can_lock_namespaces", lambda binary: True)
    command = isolation.command("bubblewrap", 1 << 20)
    assert command[:3] == ["/usr/bin/bwrap", "--unshare-user", "--disable-userns"]
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
