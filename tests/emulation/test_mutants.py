"""The mutation script finds what it should change, and its switch makes exactly that change."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BODY = """\
// comments stay: a < b, sync_block(), i + 1
#define LIMIT (7 > 3 ? 1 : 2)
constexpr int kTwo = 1 + 1;
static_assert(kTwo == 2, "never switched");
template <typename T>
int count(T limit, int step) {
  int seen = 0;
  for (int i = 0; i < limit; i += step) ++seen;
  sync_block();
  copy_wait<1>();
  if (seen == 3 && limit > 2.5f) return seen - 1;
  return seen << 1;
}
"""
CALLS = """\
#include <cstdio>
int log_ = 0;
void sync_block() { log_ += 100; }
template <int n> void copy_wait() { log_ += 1000 * n; }
#include "body.cuh"
int main() {
  for (int id = 0; id <= LAST; ++id) {
    dlm_set_mutant(id);
    log_ = 0;
    const int int_count = count(6, 2), float_count = count(6.0f, 2);
    std::printf("%d %d %d %d\\n", id, int_count, float_count, log_);
  }
}
"""


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", HERE / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mutated(mutants, tmp_path):
    (tmp_path / "original.cuh").write_text(BODY)
    writer = mutants.Writer()
    (tmp_path / "body.cuh").write_text(writer.mutate(tmp_path / "original.cuh", "cuda/b.cuh"))
    return tmp_path, {(mutant.line, mutant.change): mutant.id for mutant in writer.mutants}


def test_every_place_is_found(mutated):
    _, ids = mutated
    assert set(ids) == {
        (8, "loop step + 1"),
        (8, "loop step - 1"),
        (8, "< at column 21: <="),
        (8, "< at column 21: right side - 1"),
        (9, "without sync_block()"),
        (10, "without copy_wait<1>()"),
        (10, "one copy more pending: copy_wait<1>()"),
        (11, "== at column 12: !="),
        (11, "== at column 12: right side + 1"),
        (11, "== at column 12: right side - 1"),
        (11, "> at column 26: >="),
        (11, "> at column 26: right side + 1"),
        (11, "- 1: - 2"),
        (11, "- 1: - 0"),
    }
    assert len(set(ids.values())) == len(ids)


def test_the_switch_changes_one_thing(mutated):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder, ids = mutated
    (folder / "main.cpp").write_text(CALLS.replace("LAST", str(max(ids.values()))))
    command = [compiler, "-std=c++17", "-include", HERE / "mutant.h", "main.cpp", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True)
    out = subprocess.run([folder / "program"], capture_output=True, text=True, check=True).stdout
    got = {int(line.split()[0]): [int(x) for x in line.split()[1:]] for line in out.splitlines()}
    usual = [2, 2, 2200]  # three rounds each, minus one
    changed = {
        (8, "loop step + 1"): [4, 4, 2200],
        (8, "loop step - 1"): [12, 12, 2200],
        (8, "< at column 21: <="): [8, 8, 2200],
        (8, "< at column 21: right side - 1"): [2, 2, 2200],  # of integers: 0, 2, 4 as before
        (9, "without sync_block()"): [2, 2, 2000],
        (10, "without copy_wait<1>()"): [2, 2, 200],
        (10, "one copy more pending: copy_wait<1>()"): [2, 2, 4200],
        (11, "== at column 12: !="): [6, 6, 2200],
        (11, "== at column 12: right side + 1"): [6, 6, 2200],
        (11, "== at column 12: right side - 1"): [6, 6, 2200],
        (11, "> at column 26: >="): usual,
        (11, "> at column 26: right side + 1"): usual,  # floats have no such mutant
        (11, "- 1: - 2"): [1, 1, 2200],
        (11, "- 1: - 0"): [3, 3, 2200],
    }
    by_id = {ids[place]: want for place, want in changed.items()}
    assert {
        number: values for number, values in got.items() if values != by_id.get(number, usual)
    } == {}
    assert got[0] == usual
