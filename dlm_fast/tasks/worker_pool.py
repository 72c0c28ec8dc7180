"""Calling a function in worker processes that are killed at a limit and replaced.

For checkers that read hostile text with libraries which can hang, crash or eat all memory. Workers
are started as fresh interpreters (fork would copy torch and OpenMP in whatever state they are in)
and import nothing of this package. Each call has a limit of CPU time, so a busy machine fails
nobody, and one call at a time goes to a worker, so a call that hangs costs no other its answer.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESS = Path(__file__).with_name("worker_process.py")

# What a worker may take to import its libraries, on a machine that is busy with something else.
START_SECONDS = 120.0
# Wall-clock time per second of CPU time: generous, because a busy machine is not the answer's
# fault. It ends a process that waits instead of computing.
PATIENCE = 20
# A worker that dies by another hand (not at its limit) is no verdict on the answer: try again once.
TRIES = 2


class WorkerError(RuntimeError):
    """A worker cannot be started, so nothing can be checked."""


@dataclass(frozen=True)
class Outcome:
    """What came of one call."""

    value: Any = None
    """what the function returned"""
    failure: str | None = None
    """None, "timeout", "memory", "crash" (the worker died, twice), or the exception it raised"""


class WorkerPool:
    """Up to `workers` processes that call `function` of the file `path`; safe in any thread.

    Workers start when they are first needed. `close` ends them, as do the end of the program, the
    collection of the pool, and the parent's death, whatever kills it. A forked copy of the parent
    gets workers of its own.

    Args:
        path: a Python file that imports nothing relative to itself
        function: its function; takes and returns what JSON can hold
        workers: most processes at once
        seconds: CPU time of a call
        memory: address space of a worker in bytes
    """

    def __init__(
        self, path: Path, function: str, *, workers: int, seconds: float, memory: int
    ) -> None:
        if workers < 1 or seconds <= 0 or memory < 1:
            raise ValueError(
                f"workers, seconds and memory must be positive, got {workers}, {seconds}, {memory}"
            )
        self.seconds = seconds
        self._command = [sys.executable, "-P", str(PROCESS), str(path), function, str(memory)]
        self._workers = workers
        self._lock = threading.Lock()
        self._crew: _Crew | None = None
        self._end_crew: weakref.finalize | None = None
        os.register_at_fork(after_in_child=_forget_in_child(self))

    def call(self, *arguments: Any) -> Outcome:
        """One call, from this thread."""
        return self._running().call(arguments, self.seconds)

    def map(self, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """One outcome per call, in order; the calls run side by side."""
        if len(calls) <= 1:
            return [self.call(*arguments) for arguments in calls]
        crew = self._running()
        futures = [crew.threads.submit(crew.call, tuple(call), self.seconds) for call in calls]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C among others: what has not begun does not begin
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        """End the workers. The next call starts new ones."""
        with self._lock:
            end, self._crew, self._end_crew = self._end_crew, None, None
        if end is not None:
            end()

    def processes(self) -> list[int]:
        """Ids of the processes that are alive, for tests and reports."""
        crew = self._crew
        return [] if crew is None else crew.processes()

    def _running(self) -> _Crew:
        with self._lock:
            if self._crew is None:
                self._crew = _Crew(self._command, self._workers)
                # The finaliser holds the crew, never the pool, which could not be collected then.
                self._end_crew = weakref.finalize(self, self._crew.stop)
            return self._crew

    def _forget(self) -> None:
        crew, end = self._crew, self._end_crew
        self._crew, self._end_crew, self._lock = None, None, threading.Lock()
        if crew is not None and end is not None:
            end.detach()
            crew.abandon()


def _forget_in_child(pool: WorkerPool) -> Any:
    reference = weakref.ref(pool)

    def forget() -> None:
        if (alive := reference()) is not None:
            alive._forget()

    return forget


class _Crew:
    """The processes of a pool, and the threads that wait for them."""

    def __init__(self, command: list[str], workers: int) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._alive: set[_Worker] = set()
        self._stopped = False
        # None stands for a worker that is not started yet; the most recently used one comes first.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="worker-pool")

    def call(self, arguments: tuple[Any, ...], seconds: float) -> Outcome:
        limits = {"cpu": seconds, "wall": PATIENCE * seconds}
        request = json.dumps({"arguments": arguments, **limits}).encode() + b"\n"
        worker = self._idle.get()
        try:
            for _ in range(TRIES):
                worker = worker or self._start()
                outcome = worker.ask(request, seconds)
                if outcome.failure in ("timeout", "crash", "memory"):
                    # After a MemoryError the libraries may be left with half-made state.
                    self._end(worker)
                    worker = None
                if outcome.failure != "crash":
                    break
            return outcome
        except BaseException:
            # Interrupted between question and answer: the next caller must not read that answer.
            if worker is not None:
                self._end(worker)
                worker = None
            raise
        finally:
            self._idle.put(worker)

    def processes(self) -> list[int]:
        with self._lock:
            return [worker.process.pid for worker in self._alive]

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            workers, self._alive = self._alive, set()
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        # Pipes of busy workers are closed by the threads that read them: a number closed here might
        # already name another file there.
        while not self._idle.empty():
            if (worker_or_none := self._idle.get()) is not None:
                worker_or_none.let_go()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's workers without ending them."""
        for worker in self._alive:
            worker.let_go()

    def _start(self) -> _Worker:
        with self._lock:
            if self._stopped:
                raise WorkerError("the pool was closed while it was in use")
            worker = _Worker(self._command)
            self._alive.add(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: _Worker) -> None:
        with self._lock:
            self._alive.discard(worker)
        worker.end()


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, command: list[str]) -> None:
        # A process group of its own: Ctrl-C in a terminal is for the parent to handle.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            process_group=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        os.set_blocking(self._requests.fileno(), False)

    def wait_until_ready(self) -> None:
        message = self._receive(time.monotonic() + START_SECONDS)
        if message is None:
            raise WorkerError(
                f"a worker ended or hung while it started (exit status {self.process.poll()}); "
                f"run it by hand to see why: {' '.join(self.process.args)}"  # type: ignore[arg-type]
            )
        if "failure" in message:
            raise WorkerError(f"a worker cannot start: {message['failure']}")

    def ask(self, request: bytes, seconds: float) -> Outcome:
        # The worker's own timers come first; this one is for a process that was stopped or is
        # starved to the point where even they do not end it.
        deadline = time.monotonic() + 1.5 * PATIENCE * seconds + 1
        message = self._receive(deadline) if self._send(request, deadline) else None
        if message is not None:
            return Outcome(message.get("value"), message.get("failure"))
        if time.monotonic() >= deadline:
            return Outcome(failure="timeout")
        try:
            status = self.process.wait(timeout=START_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(failure="crash")
        at_limit = status in (-signal.SIGPROF, -signal.SIGALRM, -signal.SIGXCPU)
        return Outcome(failure="timeout" if at_limit else "crash")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.kill()
        self.let_go()

    def let_go(self) -> None:
        self._requests.close()
        self._answers.close()

    def _send(self, data: bytes, deadline: float) -> bool:
        view = memoryview(data)
        while view:
            if not self._wait(self._requests.fileno(), select.POLLOUT, deadline):
                return False
            try:
                view = view[os.write(self._requests.fileno(), view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return False
        return True

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        data = bytearray()
        while not data.endswith(b"\n"):
            if not self._wait(self._answers.fileno(), select.POLLIN, deadline):
                return None
            part = os.read(self._answers.fileno(), 1 << 16)
            if not part:
                return None
            data += part
        return json.loads(data)

    def _wait(self, descriptor: int, event: int, deadline: float) -> bool:
        poll = select.poll()
        poll.register(descriptor, event)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
