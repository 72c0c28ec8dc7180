"""Shows that the emulated tests notice changes of the kernel bodies.

    python tests/emulation/mutate_kernels.py [--body NAME] [--jobs 2] [--save FILE]

All mutants (mutants.py) are compiled into one emulator module; every one of the named body and of
the headers it includes is run against the tests of all bodies that contain it
(mutation_runner.py). What survives is run again under the address sanitizer, which sees reads
outside. equivalent_mutants.toml lists those that change nothing, with the reason. Leaves with 1
where a mutant survives.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from mutants import Mutant, Writer, included

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EQUIVALENT = HERE / "equivalent_mutants.toml"


def mutated_tree(scratch: Path) -> list[Mutant]:
    """A copy of what the emulator is built from, with the mutants in it."""
    tree = scratch / "tree"
    for name in ("csrc", "bindings"):
        shutil.copytree(ROOT / name, tree / name)
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    writer = Writer()
    csrc = tree / "csrc"
    for path in sorted([*csrc.glob("cuda/*.cuh"), *csrc.glob("cuda/device/*.cuh")]):
        path.write_text(writer.mutate(path, path.relative_to(csrc).as_posix()))
    return writer.mutants


def build(scratch: Path, sanitize: bool, jobs: int) -> Path:
    """The emulator's module with all mutants."""
    import pybind11

    folder = scratch / ("sanitized" if sanitize else "plain")
    # a compiler that takes a loop past the end of an array to end in time would mend mutants
    flags = "-w -fno-aggressive-loop-optimizations" if _is_gcc() else "-w"
    defines = {
        "CMAKE_CXX_FLAGS": f"-include {HERE / 'mutant.h'} {flags}",
        "CMAKE_CXX_FLAGS_RELEASE": "-O1",
        "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",  # takes longer than it saves
        "DLM_CUDA": "OFF",
        "DLM_SANITIZE": "ON" if sanitize else "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    options = [f"-D{name}={value}" for name, value in defines.items()]
    _call(["cmake", "-S", scratch / "tree", "-B", folder, "-G", "Ninja", *options])
    _call(["cmake", "--build", folder, "--target", "_C_emulated", "-j", jobs])
    (library,) = folder.glob("_C_emulated*.so")
    return library


def _is_gcc() -> bool:
    compiler = os.environ.get("CXX", "g++")
    return "Free Software Foundation" in subprocess.check_output([compiler, "--version"], text=True)


def _call(command: list[Any]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-8000:]}{done.stderr[-8000:]}")


def run(
    scratch: Path, library: Path, tests: dict[int, list[str]], sanitize: bool, jobs: int
) -> dict[int, str]:
    """Outcome per mutant; `tests` are the files that each is run against."""
    results = scratch / "results.jsonl"
    job = {
        "library": str(library),
        "tests": sorted({str(HERE / name) for names in tests.values() for name in names}),
        "mutants": [{"id": number, "tests": names} for number, names in tests.items()],
        "jobs": jobs,
        "patience": 1000 if sanitize else 10,  # of seconds without the sanitizers
        "results": str(results),
        "reach": str(scratch / "reach.json"),
    }
    (scratch / "job.json").write_text(json.dumps(job))
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if sanitize:
        environment |= {"LD_PRELOAD": _sanitizers(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(HERE / "mutation_runner.py"), str(scratch / "job.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the tests do not run:\n{done.stdout[-8000:]}{done.stderr[-8000:]}")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {line["id"]: line["outcome"] for line in lines}


def _sanitizers() -> str:
    """libstdc++ must be known before the interceptors are set up."""
    compiler = os.environ.get("CXX", "g++")
    names = [f"-print-file-name=lib{name}.so" for name in ("asan", "ubsan", "stdc++")]
    found = [subprocess.check_output([compiler, name], text=True).strip() for name in names]
    return " ".join(found)


def tests_of(mutants: list[Mutant], chosen: list[str]) -> dict[int, list[str]]:
    """Mutants of the chosen bodies and of what they include; each with the test files of every
    body that contains it."""
    files = {body: included(ROOT / "csrc", body) for body in all_bodies()}
    wanted = {file for body in chosen for file in files[body]}
    return {
        mutant.id: [f"test_{body}.py" for body in files if mutant.file in files[body]]
        for mutant in mutants
        if mutant.file in wanted
    }


def all_bodies() -> list[str]:
    return sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))


def equivalent() -> dict[tuple[str, str, str], str]:
    """Mutants that change nothing a program could see, with the reason."""
    if not EQUIVALENT.is_file():
        return {}
    entries = tomllib.loads(EQUIVALENT.read_text())["mutant"]
    return {
        (entry["file"], entry["code"], change): entry["reason"]
        for entry in entries
        for change in entry["changes"]
    }


def outcomes(scratch: Path, mutants: list[Mutant], bodies: list[str], jobs: int) -> dict[int, str]:
    """Of every mutant of the bodies, those that survive tried twice."""
    known = equivalent()
    tests = tests_of(mutants, bodies)
    equal = {m.id: "equivalent" for m in mutants if m.key() in known and m.id in tests}
    first = {number: names for number, names in tests.items() if number not in equal}
    found = run(scratch, build(scratch, False, jobs), first, False, jobs)
    again = {number: names for number, names in first.items() if found[number] == "survived"}
    if again:
        found |= run(scratch, build(scratch, True, jobs), again, True, jobs)
    return found | equal


def report(mutants: list[Mutant], found: dict[int, str]) -> dict[str, Any]:
    """Counts per file, and every mutant that neither died nor is known to change nothing."""
    files: dict[str, Counter[str]] = {}
    survivors = []
    for mutant in mutants:
        if mutant.id not in found:
            continue
        outcome = found[mutant.id]
        if outcome == "not reached" and "right side" in mutant.change:
            base = mutant.id - (1 if mutant.change.endswith("+ 1") else 2)
            if found.get(base) != "not reached":
                continue  # a comparison of other things than integers has no such mutant
        files.setdefault(mutant.file, Counter())[outcome] += 1
        if outcome not in ("killed", "equivalent"):
            survivors.append(
                {
                    "file": mutant.file,
                    "line": mutant.line,
                    "code": mutant.code,
                    "change": mutant.change,
                    "outcome": outcome,
                }
            )
    return {"files": {name: dict(counts) for name, counts in files.items()}, "survivors": survivors}


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The earlier summary, with what this run says of its files."""
    files = before["files"] | now["files"]
    kept = [one for one in before["survivors"] if one["file"] not in now["files"]]
    return {"files": dict(sorted(files.items())), "survivors": kept + now["survivors"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--body", action="append", help="name of a body; all without it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--save", type=Path, help="JSON file to bring up to date")
    options = parser.parse_args()
    unknown = set(options.body or []) - set(all_bodies())
    if unknown:
        parser.error(f"no body is named {', '.join(sorted(unknown))}; there are {all_bodies()}")
    bodies = options.body or all_bodies()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        mutants = mutated_tree(scratch)
        summary = report(mutants, outcomes(scratch, mutants, bodies, options.jobs))
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    if options.save:
        before = {"files": {}, "survivors": []}
        if options.save.is_file():
            before = json.loads(options.save.read_text())
        options.save.write_text(json.dumps(merged(before, summary), indent=2) + "\n")
    return 1 if summary["survivors"] else 0


if __name__ == "__main__":
    sys.exit(main())
