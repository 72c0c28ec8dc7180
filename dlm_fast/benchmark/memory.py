"""Memory that a call needs beyond its inputs and results, measured in a fresh process."""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    # First a call on a small problem, then the call to measure, which returns the tensors it made.
    Calls = tuple[Callable[[], object], Callable[[], Iterable[Tensor]]]

_STATUS = Path("/proc/self/status")
_CHILD = """
import json, sys
request = json.loads(sys.stdin.read())
sys.path[:] = request["path"]
from dlm_fast.benchmark.memory import answer
sys.stdout.write("\\n" + json.dumps(answer(request)))
"""


def extra_bytes(setup: str, **arguments: Any) -> int:
    """``setup``: "module:function", called with the arguments (JSON) in the new process; it makes
    the inputs and returns ``Calls``."""
    request = {"path": sys.path, "setup": setup, "arguments": arguments}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{setup} with {arguments} failed in its own process:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def answer(request: dict[str, Any]) -> int:
    """What the new process does."""
    module, _, function = request["setup"].partition(":")
    calls: Calls = getattr(importlib.import_module(module), function)(**request["arguments"])
    warm_up, call = calls
    warm_up()
    before = _settle()
    made = list(call())
    return max(0, _peak() - before - sum(tensor.nbytes for tensor in made))


def _settle() -> int:
    """Gives freed memory back, lets the peak start anew where the system can; bytes held."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _field("VmRSS")
    except (OSError, AttributeError, TypeError):
        return _peak()


def _peak() -> int:
    if _STATUS.exists():
        return _field("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
