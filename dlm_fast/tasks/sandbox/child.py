"""One child process of the sandbox: started, watched, and ended with all it has started."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from . import isolation, leftovers
from .inside import wire
from .isolation import SandboxError

START_SECONDS = 60.0
"""how long a child may take to shut itself off, on a machine under load; none of it is a snippet's
time"""
_END_SECONDS = 10.0
_READ = 1 << 16
_USERS = isolation.LAST_USER - isolation.FIRST_USER + 1
# Counted, so that no two children of a trainer are the same user at a time.
_numbers = itertools.count(secrets.randbelow(_USERS))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a snippet may use."""

    seconds: float
    """wall-clock time of one test"""
    total_seconds: float
    """wall-clock time of all tests of a snippet"""
    memory_bytes: int
    """address space of a process"""
    disk_bytes: int
    """size of the scratch disk; where there is none, of a file"""
    processes: int
    """processes and threads at a time"""
    output_bytes: int
    """what a program may print"""
    packages: bool = False
    """whether the installed packages can be imported, besides the standard library"""

    def resources(self, mode: str, seconds: float) -> dict[str, int]:
        """Resource limits of a child that may compute for `seconds`."""
        processes = self.processes
        if mode == "process":  # here the kernel counts what this user runs elsewhere, too
            processes += leftovers.count_processes(os.geteuid())
        return {
            "CPU": math.ceil(seconds) + 1,
            "AS": self.memory_bytes,
            "FSIZE": self.disk_bytes,
            "NPROC": processes,
            "NOFILE": 64,
            "CORE": 0,
        }


class Child:
    """A child in a role, and a context manager that leaves nothing behind.

    `spec` is what the role wants (`inside`), `link` the open files that are its ends of the link.
    SandboxError says that a child cannot be made here.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        mode: str,
        limits: Limits,
        *,
        link: tuple[int, int] = (-1, -1),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        self._mode = mode
        self._token = f"{os.getpid()}-{secrets.token_hex(16)}"
        self._user = isolation.FIRST_USER + next(_numbers) % _USERS
        self._folder: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._alive = -1
        self.reports = Lines(-1)
        try:
            self._start(spec, limits, link, stdin, stdout)
        except OSError as error:
            self.end()
            raise SandboxError(
                f"a child process of the sandbox cannot be started ({error}); see that processes "
                f"can be made and {tempfile.gettempdir()} has space"
            ) from None
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started here, not always the one that runs the snippet."""
        assert self._process is not None, "set by the constructor"
        return self._process

    def await_ready(self) -> None:
        """Returns when the child is shut off; what it does from now on is the snippet's time."""
        try:
            line = self.reports.next(time.monotonic() + START_SECONDS)
        except TimeoutError:
            line = f"not ready after {START_SECONDS:.0f} s"
        if line != "ready":
            reason = (line or "it ended before it was ready").removeprefix("broken ")
            raise SandboxError(f"the sandbox in mode {self._mode} does not start: {reason}")

    def end(self) -> None:
        """Ends the child and all it started, removes what it wrote; more than once is legal."""
        if self._process is not None:
            self._end_namespace(self._process)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._end_descendants()
            self._process = None
        self.reports.close()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        if self._folder is not None:
            leftovers.remove_tree(self._folder)
            self._folder = None

    def _start(
        self, spec: dict[str, Any], limits: Limits, link: tuple[int, int], stdin: int, stdout: int
    ) -> None:
        if self._mode in ("user", "process"):
            self._folder = tempfile.mkdtemp(prefix="dlm_fast_sandbox_")
            if self._mode == "user":
                os.chown(self._folder, self._user, self._user)
        where = {
            "mode": self._mode,
            "parent": os.getpid(),
            "user": self._user,
            "disk_bytes": limits.disk_bytes,
            "home": isolation.HOME,
            "visible": list(isolation.visible_paths(limits.packages)),
            "packages": list(isolation.package_folders()) if limits.packages else [],
        }
        opened: list[int] = []
        try:
            spec_fd = file_of(wire.encode(spec | where))
            opened.append(spec_fd)
            self._alive, alive = os.pipe()
            opened.append(alive)
            report_read, report = os.pipe()
            opened.append(report)
            self.reports = Lines(report_read)
            given = [spec_fd, report, alive, *(fd for fd in link if fd >= 0)]
            self._process = subprocess.Popen(
                [
                    *isolation.command(self._mode, limits.disk_bytes, limits.packages),
                    *map(str, (spec_fd, report, *link)),
                ],
                env=self._environment(),
                cwd=self._folder or "/",
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=given,
                start_new_session=True,
            )
        finally:
            for fd in opened:
                os.close(fd)

    def _environment(self) -> dict[str, str]:
        home = self._folder or isolation.HOME
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": home,
            "TMPDIR": home,
            "LANG": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",  # threads count as processes
            "OMP_NUM_THREADS": "1",
            leftovers.MARK: self._token,
        }

    def _end_namespace(self, starter: subprocess.Popen[bytes]) -> None:
        """Kills the first process of the namespace; the starter waits until all of it is gone."""
        if self._mode in ("user", "process") or starter.poll() is not None:
            return
        children = leftovers.children_of(starter.pid)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                starter.wait(_END_SECONDS)

    def _end_descendants(self) -> None:
        if self._mode == "user":
            leftovers.kill_user(self._user)
        elif self._mode == "process":
            leftovers.kill_marked(self._token)
        else:
            # Where the starter was killed before it could wait, the kernel ends its namespace a
            # little later; this end of a pipe that the first process holds says when.
            wait_readable(self._alive, time.monotonic() + _END_SECONDS)


class Lines:
    """Lines from a pipe, each by a deadline; those of a child are short."""

    MAX_LINE = 4096

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = b""

    def next(self, deadline: float) -> str | None:
        """The next line, None when the pipe is closed; TimeoutError at the deadline."""
        while b"\n" not in self._data:
            if not wait_readable(self._fd, deadline):
                raise TimeoutError
            part = os.read(self._fd, _READ)
            if not part or len(self._data) > self.MAX_LINE:
                return None
            self._data += part
        line, _, self._data = self._data.partition(b"\n")
        return line.decode("ascii", "replace")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def wait_readable(fd: int, deadline: float, *others: int) -> bool:
    """Whether one of the files can be read or is closed before the deadline."""
    poll = select.poll()
    for each in (fd, *others):
        poll.register(each, select.POLLIN)
    left = deadline - time.monotonic()
    return bool(poll.poll(max(0, math.ceil(left * 1000))))


def file_of(data: bytes) -> int:
    """An open file without a name that holds `data`, at its beginning."""
    fd = -1
    try:
        fd = os.memfd_create("dlm_fast")
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise SandboxError(f"no memory file for a child process can be made: {error}") from None
    return fd
