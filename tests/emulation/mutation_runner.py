"""Runs the emulated tests once per mutant, in forked children: ``python mutation_runner.py JOB``.

JOB is a JSON file: ``library`` (the module with all mutants), ``tests`` (files), ``mutants`` (each
an ``id`` and its ``tests``), ``jobs``, ``patience`` (CPU seconds a test may take, as a multiple of
what it takes without a mutant), ``results`` (file for one JSON line per mutant), ``reach`` (JSON
file that says of every test which mutants it executes and in how many seconds; written where it is
missing: the sanitizers need not find out again, in ten times the time).
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

RECORD = -1
MOST = 1 << 14  # as in mutant.h
LEAST_PATIENCE = 3.0


def load(library: str) -> ctypes.CDLL:
    """Puts the module with the mutants in the place of the emulator's."""
    import dlm_fast

    name = "dlm_fast._C_emulated"
    loader = importlib.machinery.ExtensionFileLoader(name, library)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    dlm_fast._C_emulated = module  # type: ignore[attr-defined]
    return ctypes.CDLL(library)


class Runner:
    """A pytest plugin whose test loop goes through the mutants."""

    def __init__(self, job: dict[str, Any], switch: ctypes.CDLL) -> None:
        self.job, self.switch = job, switch
        self.failed, self.why = False, ""
        self.reach: list[set[int]] = []  # per item, which mutants it executes
        self.seconds: list[float] = []  # per item, without a mutant
        self.kills: Counter[int] = Counter()
        self.results = Path(job["results"])
        self.running: dict[int, tuple[int, int]] = {}  # process -> mutant, pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = True
            self.why = report.longreprtext

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = session.items
        known = Path(self.job["reach"])
        if not known.is_file():
            known.write_text(json.dumps(self._record(items)))
        told = json.loads(known.read_text())
        self.reach = [set(told[item.nodeid]["mutants"]) for item in items]
        self.seconds = [told[item.nodeid]["seconds"] for item in items]
        for mutant in self.job["mutants"]:
            while len(self.running) >= self.job["jobs"]:
                self._wait()
            self._start(mutant, items)
        while self.running:
            self._wait()
        for index in self.kills:  # they know a mutant by failing only if they pass without one
            self._run_as_it_is(items[index])
        return True

    def _record(self, items: list[pytest.Item]) -> dict[str, dict[str, Any]]:
        buffer = (ctypes.c_ubyte * MOST)()
        found = {}
        for item in items:
            start = time.process_time()
            self._run_as_it_is(item)
            seconds = time.process_time() - start
            self.switch.dlm_take_reached(buffer)
            reached = [number for number, byte in enumerate(bytes(buffer)) if byte]
            found[item.nodeid] = {"seconds": seconds, "mutants": reached}
        return found

    def _run_as_it_is(self, item: pytest.Item) -> None:
        self.switch.dlm_set_mutant(RECORD)
        self._run(item)
        assert not self.failed, f"{item.nodeid} fails without a mutant:\n{self.why}"

    def _run(self, item: pytest.Item) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)

    def _start(self, mutant: dict[str, Any], items: list[pytest.Item]) -> None:
        wanted = set(mutant["tests"])
        number = mutant["id"]
        chosen = [
            index
            for index, item in enumerate(items)
            if item.path.name in wanted and number in self.reach[index]
        ]
        if not chosen:
            self._tell(number, "not reached")
            return
        # what killed others goes first, then the cheap ones
        chosen.sort(key=lambda index: (-self.kills[index], self.seconds[index]))
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            self._child(number, chosen, items, writer)
        os.close(writer)
        self.running[process] = number, reader

    def _child(self, number: int, chosen: list[int], items: list, writer: int) -> None:
        """Tells the index of every item before it runs it; leaves with 1 when one fails."""
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        self.switch.dlm_set_mutant(number)
        for index in chosen:
            os.write(writer, index.to_bytes(4, "little"))
            limit = max(LEAST_PATIENCE, self.job["patience"] * self.seconds[index])
            signal.setitimer(signal.ITIMER_VIRTUAL, limit)  # ends the process: no handler
            self._run(items[index])
            if self.failed:
                os._exit(1)
        os._exit(0)

    def _wait(self) -> None:
        process, status = os.wait()
        number, reader = self.running.pop(process)
        with os.fdopen(reader, "rb") as file:
            told = file.read()
        last = int.from_bytes(told[-4:], "little")
        if status == 0:
            self._tell(number, "survived")
            return
        self.kills[last] += 1
        self._tell(number, "killed")

    def _tell(self, number: int, outcome: str) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps({"id": number, "outcome": outcome}) + "\n")


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    switch = load(job["library"])
    options = ["--tb=no", "-p", "no:cacheprovider", *job["tests"]]
    if pytest.main(options, [Runner(job, switch)]) not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
