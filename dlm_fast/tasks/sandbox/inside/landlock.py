"""Takes files, signals and TCP from this process by Landlock, where no namespace hides them.

Needs no rights and works in most containers; what it can take depends on the kernel's version of it
(files from 1, TCP from 4, signals to processes outside from 6).
"""

from __future__ import annotations

import ctypes
import os
import sys

SYS_CREATE_RULESET, SYS_ADD_RULE, SYS_RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
# How many kinds of access to files each version knows.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
NEWEST_FILE_RIGHTS = 16
TCP_VERSION, TCP_RIGHTS = 4, 0b11
SCOPE_VERSION, SCOPES = 6, 0b11


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "tcp", "scopes")]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def version() -> int:
    """Of the running kernel; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, _call(SYS_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION))


def restrict(readable: list[str], devices: list[str], own: str) -> bool:
    """Leaves reading below some paths, devices, and everything below one folder.

    Whether the kernel can. OSError if it can and does not.
    """
    known = version()
    if known == 0:
        return False
    everything = (1 << FILE_RIGHTS.get(known, NEWEST_FILE_RIGHTS)) - 1
    rules = _Ruleset(
        files=everything,
        tcp=TCP_RIGHTS if known >= TCP_VERSION else 0,
        scopes=SCOPES if known >= SCOPE_VERSION else 0,
    )
    # Older kernels take the fields they know alone.
    size = 24 if known >= SCOPE_VERSION else 16 if known >= TCP_VERSION else 8
    ruleset = _checked(_call(SYS_CREATE_RULESET, ctypes.byref(rules), size, 0))
    for paths, rights in (
        (readable, EXECUTE | READ_FILE | READ_DIR),
        (devices, READ_FILE | WRITE_FILE),
        ([own], everything),
    ):
        for path in paths:
            _allow(ruleset, path, rights)
    _checked(_call(SYS_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return True


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:  # a system without it
        return
    rule = _PathBeneath(rights=rights, fd=fd)
    _checked(_call(SYS_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0))
    os.close(fd)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)  # here, for this module is read on other systems too
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return int(libc.syscall(ctypes.c_long(number), *words))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
