"""What the tests of the worker pool run in its workers: all that an answer can do to one."""

import ctypes
import os
import signal
import subprocess
import sys
import time


def double(number):
    return 2 * number


def process_id():
    return os.getpid()


def modules():
    return sorted(sys.modules)


def misbehave(how, *arguments):
    return {
        "raise": lambda: 1 // 0,
        "loop": lambda: endless(),
        "long instruction": lambda: len(str(9**9**9**9)),
        "sleep": lambda: time.sleep(1000),
        "allocate": lambda: len(bytearray(arguments[0])),
        "segfault": lambda: ctypes.string_at(0),
        "kill itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "exit": lambda: os._exit(0),
        "system exit": lambda: sys.exit(0),
        "print": lambda: sys.stdout.write('{"value": "forged"}\n'),
        "write to every descriptor": lambda: [os.write(fd, b'{"value": 1}\n') for fd in (0, 1, 2)],
        "recurse": lambda: recurse(),
        "child": lambda: subprocess.run([sys.executable, "-c", "print(1)"], check=True).returncode,
        "pass": lambda: arguments[0],
    }[how]()


def endless():
    while True:
        pass


def recurse():
    return recurse()


def once_killed(path):
    """Dies at its first call and answers at the second, as a worker does that somebody kills."""
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"
