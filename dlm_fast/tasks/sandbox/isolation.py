"""Which isolation this machine allows, and the command that starts a child in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from .inside import DEVICES, landlock

MODES = ("bubblewrap", "namespaces", "user", "process")
_SHUT_OFF = "own file system, processes and no network"
_MEANING = {
    "bubblewrap": f"bubblewrap: {_SHUT_OFF}",
    "namespaces": f"namespaces: {_SHUT_OFF}",
    "user": "user: an unused user id and resource limits",
    "process": "process: resource limits",
}
# Above what distributions give to people and services.
FIRST_USER, LAST_USER = 61_184, 65_519
INSIDE = Path(__file__).resolve().parent
SANDBOX_FOLDER = "/sandbox"
SCRATCH = "/tmp"
HOME = f"{SCRATCH}/home"
"""the working directory inside, where the file system is the sandbox's own"""
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store")
_START = "import sys; sys.path.append({folder!r}); from inside.start import main; main()"


class SandboxError(RuntimeError):
    """The sandbox or the tests do not work: no verdict was made, and none is to be assumed."""


def meaning(mode: str) -> str:
    """What a mode keeps a snippet from, on this machine, in a line."""
    text = _MEANING[mode]
    if mode not in ("user", "process"):
        return text
    version = landlock.version()
    if version >= landlock.SCOPE_VERSION:
        return f"{text}; Landlock {version} keeps it from files, other processes and TCP"
    if version:
        tcp = " and TCP" if version >= landlock.TCP_VERSION else ""
        return f"{text}; Landlock {version} keeps it from files{tcp}"
    return f"{text} alone: files and network are open to it"


def candidates() -> list[str]:
    """Modes worth trying here, the strongest first; empty where there is no sandbox at all."""
    if sys.platform != "linux":
        return []
    if os.geteuid() == 0:
        # Under bubblewrap the machine's root stays root, whose processes no limit counts.
        return ["namespaces", *(["bubblewrap"] if bubblewrap() else []), "user", "process"]
    return [*(["bubblewrap"] if bubblewrap() else []), "namespaces", "process"]


@lru_cache(maxsize=1)
def bubblewrap() -> str | None:
    """The path of bubblewrap, or None."""
    return shutil.which("bwrap")


@lru_cache(maxsize=4)
def _can_lock_namespaces(binary: str) -> bool:
    """Whether this bubblewrap (0.8) can forbid further user namespaces inside."""
    found = subprocess.run([binary, "--help"], capture_output=True, text=True, check=False)
    return "--disable-userns" in found.stdout + found.stderr


@lru_cache(maxsize=1)
def package_folders() -> tuple[str, ...]:
    """Where the packages lie that are installed for this interpreter."""
    names = ("site-packages", "dist-packages")
    return tuple(path for path in sys.path if path.endswith(names) and os.path.isdir(path))


@lru_cache(maxsize=2)
def visible_paths(packages: bool = False) -> tuple[str, ...]:
    """What a child may read: the interpreter with its library, and the system's libraries."""
    wanted = [*_SYSTEM, sys.base_prefix, sys.base_exec_prefix]
    wanted += package_folders() if packages else ()
    wanted.append(str(Path(sys.executable).resolve().parent.parent))
    paths: list[str] = []
    for path in wanted:
        if os.path.exists(path) and not any(Path(path).is_relative_to(seen) for seen in paths):
            paths.append(path)
    return tuple(paths)


def command(mode: str, disk_bytes: int, packages: bool = False) -> list[str]:
    """The command line of a child, up to its arguments."""
    # The interpreter behind a virtual environment: the environment itself is not visible inside.
    python = [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", "-c"]
    if mode != "bubblewrap":
        return [*python, _START.format(folder=str(INSIDE))]
    binary = bubblewrap()
    if binary is None:
        raise SandboxError("isolation bubblewrap was asked for, but there is no bwrap on the PATH")
    lock = ["--unshare-user", "--disable-userns"] if _can_lock_namespaces(binary) else []
    return [
        binary,
        *lock,
        *bubblewrap_options(visible_paths(packages), disk_bytes),
        *("--", *python, _START.format(folder=SANDBOX_FOLDER)),
    ]


def bubblewrap_options(paths: tuple[str, ...], disk_bytes: int) -> list[str]:
    """Options of bwrap: everything unshared, `paths` read-only, a scratch disk under /tmp."""
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    options += ["--uid", "1000", "--gid", "1000", "--hostname", "sandbox"]
    # Before the paths, of which one may lie under /tmp.
    options += ["--size", str(disk_bytes), "--tmpfs", SCRATCH]
    for path in paths:
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        else:
            options += ["--ro-bind", path, path]
    for device in DEVICES:
        options += ["--dev-bind-try", device, device]
    options += ["--ro-bind", str(INSIDE / "inside"), f"{SANDBOX_FOLDER}/inside"]
    return [*options, "--dir", HOME, "--remount-ro", "/", "--chdir", HOME]
