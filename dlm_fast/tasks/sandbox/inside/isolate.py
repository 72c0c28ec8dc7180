"""Shuts the process it is called in off from the rest of the machine, by the means of one mode.

Modes, from the strongest:

    namespaces   user, mount, process, network and IPC namespaces of its own: an empty file system
                 with the interpreter read-only and a small scratch disk, no network, no other
                 process in sight; when its first process ends, the kernel ends all of them
    bubblewrap   the same made by bubblewrap before this process started
    user         an unused user id (needs root), and Landlock where the kernel has it
    process      Landlock where the kernel has it; else resource limits alone
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
from typing import Any

from . import DEVICES, landlock

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
CAPABILITY_VERSION = 0x20080522

INSIDE_ID = 1000
# Where a file system of our own is put together, in our own view of the machine.
BUILDING_SITES = ("/tmp", "/mnt", "/var")

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def isolate(spec: dict[str, Any]) -> None:
    """Returns where the rest may run, in mode namespaces in a grandchild; OSError if it cannot be.

    `spec` has mode, parent (process id), user (an unused user id), limits, disk_bytes, home (a
    folder to make on the scratch disk) and visible (paths).
    """
    die_with_parent(spec["parent"] if spec["mode"] != "bubblewrap" else None)
    _prefer_to_be_killed()
    if spec["mode"] == "namespaces":
        _leave(spec)
        _become_first_process()
        _drop_capabilities()
    elif spec["mode"] == "user":
        os.setgroups([])
        os.setresgid(spec["user"], spec["user"], spec["user"])
        os.setresuid(spec["user"], spec["user"], spec["user"])
        die_with_parent(spec["parent"])  # forgotten when the user changes
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if spec["mode"] in ("user", "process"):
        # Before the limits: the rules are open files for a moment.
        landlock.restrict(spec["visible"], list(DEVICES), ".")
    limit(spec["limits"])


def die_with_parent(parent: int | None) -> None:
    """The kernel kills this process when its parent ends, however it ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "die with parent")
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def hide_memory() -> None:
    """Other processes of the same user cannot read this one's memory or open files."""
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "undumpable")


def limit(limits: dict[str, int]) -> None:
    """Resource limits by their names in `resource`; a limit in force that is lower stays."""
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prefer_to_be_killed() -> None:
    # When memory runs out, this process goes before the one that trains. A courtesy: the memory
    # limit holds without it.
    _write_if_possible("/proc/self/oom_score_adj", "1000")


def _leave(spec: dict[str, Any]) -> None:
    uid, gid = os.geteuid(), os.getegid()
    helper = None
    if uid == 0:
        # Limits on processes do not bind the machine's root, so the sandbox is another user; only
        # a process outside may write that map.
        os.setgroups([])
        helper = _start_mapping(os.getpid(), spec["user"])
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    _check(_libc.unshare(flags), "unshare")
    if helper is None:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{INSIDE_ID} {uid} 1")
        _write("/proc/self/gid_map", f"{INSIDE_ID} {gid} 1")
    else:
        _finish_mapping(*helper)
    # Opened while this process still is who may pass through the directories above them.
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in _sources(spec)]
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    # Where it cannot be: a further namespace gives nothing that this one does not lock.
    _write_if_possible("/proc/sys/user/max_user_namespaces", "0")
    _build_root(sources, spec)


def _start_mapping(pid: int, outside: int) -> tuple[int, int]:
    wait, go = os.pipe()
    child = os.fork()
    if child:
        os.close(wait)
        return child, go
    status = 1
    try:
        os.close(go)
        os.read(wait, 1)
        _write(f"/proc/{pid}/uid_map", f"{INSIDE_ID} {outside} 1")
        _write(f"/proc/{pid}/gid_map", f"{INSIDE_ID} {outside} 1")
        status = 0
    finally:
        os._exit(status)


def _finish_mapping(child: int, go: int) -> None:
    os.close(go)
    if os.waitpid(child, 0)[1] != 0:
        raise OSError("the user id of the sandbox could not be mapped")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _write_if_possible(path: str, text: str) -> bool:
    try:
        _write(path, text)
    except OSError:
        return False
    return True


def _sources(spec: dict[str, Any]) -> list[str]:
    paths = [path for path in spec["visible"] if os.path.exists(path) and not os.path.islink(path)]
    return paths + [path for path in DEVICES if os.path.exists(path)]


def _build_root(sources: list[tuple[str, int]], spec: dict[str, Any]) -> None:
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = next(path for path in BUILDING_SITES if os.path.isdir(path))
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.mkdir(f"{root}/tmp")
    disk = f"mode=700,size={spec['disk_bytes']},nr_inodes=16k"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, disk)
    for path, fd in sources:
        _show(f"{root}{path}", fd)
    for path in spec["visible"]:
        if os.path.islink(path) and not os.path.lexists(f"{root}{path}"):
            os.symlink(os.readlink(path), f"{root}{path}")
    _set_attributes(root, MS_RDONLY | MS_NOSUID | MS_NODEV, recursive=False)
    os.chdir(root)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount")
    os.mkdir(spec["home"])
    os.chdir(spec["home"])


def _show(target: str, fd: int) -> None:
    device = target.endswith(DEVICES)
    os.makedirs(os.path.dirname(target) if device else target, exist_ok=True)
    if device:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(f"/proc/self/fd/{fd}", target, None, MS_BIND | MS_REC)
    _set_attributes(target, MS_RDONLY | MS_NOSUID | (0 if device else MS_NODEV), recursive=True)
    os.close(fd)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, data: str | None = None
) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind, data)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _check(result, f"mount on {target}")


def _set_attributes(target: str, attributes: int, *, recursive: bool) -> None:
    # mount_setattr keeps what is locked and reaches every mount below, which a remount does not.
    wanted = _MountAttributes(set=attributes)
    result = _libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_long(AT_FDCWD),
        target.encode(),
        ctypes.c_long(AT_RECURSIVE if recursive else 0),
        ctypes.byref(wanted),
        ctypes.c_long(ctypes.sizeof(wanted)),
    )
    _check(result, f"mount_setattr on {target}")


def _become_first_process() -> None:
    """Goes on as process 1 of its namespace; the process that was here waits and passes its end."""
    mine, theirs = os.pipe()
    child = os.fork()
    if child:
        os.closerange(0, theirs)
        os.closerange(theirs + 1, 1 << 16)
        status = os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) % 256)
    os.close(theirs)
    os.setsid()
    die_with_parent(None)
    # Had the parent ended before that word, its end of the pipe would be closed.
    poll = select.poll()
    poll.register(mine, select.POLLHUP)
    if poll.poll(0):
        os._exit(1)
    os.close(mine)


def _drop_capabilities() -> None:
    number = 0
    while _libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
