"""The other end of `WorkerPool`: a process that answers one request a line with a named function.

Run as a file, `python -P worker_process.py FILE FUNCTION MEMORY`, never imported: nothing of the
package, and so no torch, gets into the process. FILE must not import its siblings either.

A request is one line of JSON, {"arguments": [...], "cpu": seconds, "wall": seconds}, its answer
another: {"value": v} or {"failure": why}. Limits are the kernel's: timers whose signal, unhandled,
ends the process. They hold where the interpreter never gets to run a handler (9**9**9 is one
instruction), and when the parent is long dead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO


def main(path: str, function: str, memory: int) -> None:
    """Answer requests until the parent closes the pipe, which it also does by dying."""
    requests, answers = _channel()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, memory)
    try:
        call = _function(path, function)
    except BaseException as error:
        _send(answers, {"failure": f"{type(error).__name__}: {error}"})
        raise
    _send(answers, {"value": "ready"})
    for line in requests:
        _send(answers, _answer(call, line))


def _channel() -> tuple[BinaryIO, BinaryIO]:
    # What libraries print must not reach the parent as an answer.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    return requests, answers


def _limit(what: int, value: int) -> None:
    try:
        resource.setrlimit(what, (value, value))
    except (ValueError, OSError):
        # macOS knows no limit of the address space, and some systems set a lower one themselves.
        return


def _function(path: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("worker_function", path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _answer(call: Callable[..., Any], line: bytes) -> dict[str, Any]:
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, request["cpu"])
    signal.setitimer(signal.ITIMER_REAL, request["wall"])
    try:
        return {"value": call(*request["arguments"])}
    except MemoryError:
        return {"failure": "memory"}
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _send(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
