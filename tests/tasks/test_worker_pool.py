"""The worker pool: limits end what hangs, replacements answer, nothing outlives the parent."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import worker_functions

from dlm_fast.tasks.worker_pool import Outcome, WorkerError, WorkerPool

FUNCTIONS = Path(worker_functions.__file__)
GB = 1 << 30
PATIENCE = 60.0


@pytest.fixture
def make_pool():
    pools = []

    def make(function, *, workers=2, seconds=0.2, memory=GB):
        pool = WorkerPool(FUNCTIONS, function, workers=workers, seconds=seconds, memory=memory)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def shared_pool():
    """One pool that survives everything the tests do to it."""
    pool = WorkerPool(FUNCTIONS, "misbehave", workers=2, seconds=0.2, memory=GB)
    yield pool
    pool.close()


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/stat")
    # a zombie waits for its parent, which is not always us
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until_gone(pids):
    deadline = time.monotonic() + PATIENCE
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, f"alive: {[pid for pid in pids if not is_gone(pid)]}"
        time.sleep(0.02)


def test_calls_in_order(make_pool):
    pool = make_pool("double", workers=3)
    assert pool.map([(n,) for n in range(50)]) == [Outcome(2 * n) for n in range(50)]
    assert pool.map([]) == []
    assert pool.call("ab") == Outcome("abab")
    assert 1 <= len(pool.processes()) <= 3


def test_workers_start_when_they_are_needed(make_pool):
    pool = make_pool("process_id", workers=4)
    assert pool.processes() == []
    pids = {pool.call().value for _ in range(5)}
    assert pids == set(pool.processes())
    assert len(pids) == 1


@pytest.mark.parametrize(
    ("how", "arguments", "failure"),
    [
        ("loop", (), "timeout"),
        ("long instruction", (), "timeout"),
        ("sleep", (), "timeout"),
        ("allocate", (10 * GB,), "memory"),
        ("segfault", (), "crash"),
        ("kill itself", (), "crash"),
        ("exit", (), "crash"),
        ("system exit", (), "crash"),
        ("raise", (), "ZeroDivisionError: integer division or modulo by zero"),
    ],
)
def test_what_goes_wrong_is_named_and_the_next_call_answers(shared_pool, how, arguments, failure):
    outcome = shared_pool.call(how, *arguments)
    assert outcome.value is None
    assert outcome.failure == failure
    assert shared_pool.call("pass", "still here") == Outcome("still here")


def test_deep_recursion_is_a_failure(shared_pool):
    failure = shared_pool.call("recurse").failure
    assert failure is not None
    assert failure == "crash" or failure.startswith("RecursionError")


def test_output_of_the_function_is_no_answer(shared_pool):
    assert shared_pool.call("print").value == len('{"value": "forged"}\n')
    assert shared_pool.call("write to every descriptor").value == [13, 13, 13]
    assert shared_pool.call("pass", 7) == Outcome(7)
    assert shared_pool.call("child") == Outcome(0)


def test_any_text_reaches_the_function(shared_pool):
    for text in ("", "\x00", "\udfff\ud800", "\n{}\n", "x" * 1_000_000, "\u2028"):
        assert shared_pool.call("pass", text) == Outcome(text)


def test_one_that_hangs_costs_no_other_its_answer(make_pool):
    pool = make_pool("misbehave", workers=2)
    calls = [("loop",) if n % 3 == 0 else ("pass", n) for n in range(12)]
    expected = [Outcome(failure="timeout") if n % 3 == 0 else Outcome(n) for n in range(12)]
    assert pool.map(calls) == expected


def test_all_workers_hang_and_the_rest_waits(make_pool):
    pool = make_pool("misbehave", workers=2)
    outcomes = pool.map([("loop",)] * 4 + [("pass", 1)])
    assert [outcome.failure for outcome in outcomes] == ["timeout"] * 4 + [None]


def test_a_worker_killed_from_outside_is_replaced(make_pool, tmp_path):
    pool = make_pool("process_id")
    (first,) = {pool.call().value for _ in range(3)}
    os.kill(first, signal.SIGKILL)
    wait_until_gone([first])
    second = pool.call().value
    assert second not in (None, first)
    assert pool.processes() == [second]


def test_a_worker_killed_in_the_middle_of_a_call_is_asked_again(make_pool, tmp_path):
    pool = make_pool("once_killed")
    assert pool.call(str(tmp_path / "was here")) == Outcome("alive")


def test_a_stopped_worker_is_a_timeout(make_pool):
    pool = make_pool("process_id", workers=1, seconds=0.05)
    os.kill(pool.call().value, signal.SIGSTOP)
    assert pool.call().failure == "timeout"
    assert pool.call().failure is None


def test_many_threads_share_a_pool(make_pool):
    pool = make_pool("double", workers=2)
    results: dict[int, list[Outcome]] = {}

    def work(base):
        results[base] = [*pool.map([(base + n,) for n in range(20)]), pool.call(base)]

    threads = [threading.Thread(target=work, args=(base,)) for base in range(0, 600, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for base, outcomes in results.items():
        assert outcomes == [Outcome(2 * n) for n in [*range(base, base + 20), base]]
    assert len(results) == 6


def test_workers_know_neither_torch_nor_the_package(make_pool):
    loaded = make_pool("modules", workers=1, seconds=10).call().value
    top = {name.partition(".")[0] for name in loaded}
    assert not top & {"torch", "numpy", "dlm_fast", "multiprocessing"}


def test_close_ends_the_workers_and_a_call_starts_new_ones(make_pool):
    pool = make_pool("process_id")
    first = pool.call().value
    pool.close()
    wait_until_gone([first])
    assert pool.processes() == []
    pool.close()
    assert pool.call().value != first


def test_a_forgotten_pool_ends_its_workers():
    pool = WorkerPool(FUNCTIONS, "process_id", workers=1, seconds=5, memory=GB)
    pid = pool.call().value
    del pool
    gc.collect()
    wait_until_gone([pid])


@pytest.mark.parametrize("path", ["no_such_file.py", "worker_functions.py"])
def test_a_worker_that_cannot_start_is_an_error(path):
    pool = WorkerPool(
        FUNCTIONS.with_name(path), "no_such_function", workers=1, seconds=1, memory=GB
    )
    for _ in range(2):  # the second call does not wait for a worker that never came
        with pytest.raises(WorkerError, match=r"cannot start: .*(No such file|no_such_function)"):
            pool.call()
    with pytest.raises(WorkerError):
        pool.map([(), ()])
    wait_until_gone(pool.processes())


@pytest.mark.parametrize("name", ["workers", "seconds", "memory"])
def test_bad_limits_are_named(name):
    limits = {"workers": 1, "seconds": 1.0, "memory": GB} | {name: 0}
    with pytest.raises(ValueError, match=name):
        WorkerPool(FUNCTIONS, "double", **limits)


PARENT = """
import os, signal, sys, threading, time
from pathlib import Path
from dlm_fast.tasks.worker_pool import WorkerPool

pool = WorkerPool(Path(sys.argv[1]), "misbehave", workers=2, seconds=0.5, memory=1 << 30)
pool.map([("pass", 1)] * 8)
busy = threading.Thread(target=pool.call, args=("loop",), daemon=True)
busy.start()
time.sleep(0.1)
print(*pool.processes(), flush=True)
{ending}
"""


def run_parent(ending):
    command = [sys.executable, "-c", PARENT.format(ending=ending), str(FUNCTIONS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert pids
    return process, pids


@pytest.mark.parametrize(
    "ending", ["pass", "sys.exit(3)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_workers_do_not_outlive_the_parent(ending):
    process, pids = run_parent(ending)
    process.communicate(timeout=PATIENCE)
    wait_until_gone(pids)


def test_ctrl_c_interrupts_the_caller_and_leaves_a_usable_pool():
    ending = """
def interrupt():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)

try:
    threading.Thread(target=interrupt).start()
    pool.map([("loop",)] * 50)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(pool.call("pass", "usable").value, flush=True)
print(pool.map([("pass", n) for n in range(3)])[2].value, flush=True)
print(*pool.processes(), flush=True)
"""
    process, pids = run_parent(ending)
    out, err = process.communicate(timeout=PATIENCE)
    interrupted, usable, third, last = out.splitlines()
    assert (interrupted, usable, third) == ("interrupted", "usable", "2"), err
    wait_until_gone([*pids, *map(int, last.split())])


def test_a_forked_copy_gets_workers_of_its_own():
    ending = """
before = pool.processes()
child = os.fork()
if child == 0:
    mine = pool.call("pass", "child").value
    own = pool.processes()
    print(mine, not set(own) & set(before), flush=True)
    sys.exit(0)
os.waitpid(child, 0)
print(pool.call("pass", "parent").value, set(pool.processes()) <= set(before), flush=True)
"""
    process, pids = run_parent(f"busy.join(); pool.map([('pass', 1)] * 8)\n{ending}")
    out, err = process.communicate(timeout=PATIENCE)
    assert out.splitlines() == ["child True", "parent True"], err
    wait_until_gone(pids)
