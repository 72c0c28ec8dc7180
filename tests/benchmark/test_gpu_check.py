"""benches/gpu_check.sh runs to its end whatever fails, and says so."""

import os
import shutil
import subprocess

import pytest

if shutil.which("bash") is None or shutil.which("timeout") is None:
    pytest.skip("needs bash and timeout", allow_module_level=True)

STAGES = ["facts", "build", "import", "kernels", "tests", "memcheck", "racecheck", "benchmarks"]


def check(repository, tmp_path, python, seconds=100):
    """Exit status and {stage: (status, words)} with a script in the place of Python."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/bash\n{python}\n")
    stand_in.chmod(0o755)
    out = tmp_path / "a folder" / "out"
    done = subprocess.run(
        ["bash", str(repository / "benches" / "gpu_check.sh"), str(out)],
        env=os.environ | {"PYTHON": str(stand_in), "GPU_CHECK_SECONDS": str(seconds)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    found = {}
    for line in lines:
        stage, status, *rest = line.split(None, 3)
        if status in ("passed", "failed", "skipped"):
            found[stage] = (status, rest[1] if len(rest) > 1 else "")
    assert all(line in done.stdout for line in lines)
    assert all((out / "logs" / f"{stage}.log").exists() for stage in ("facts", "build"))
    return done.returncode, found


def test_everything_fails(repository, tmp_path):
    status, found = check(repository, tmp_path, "echo no such luck; exit 3")
    assert status == 1
    assert [stage for stage in STAGES if stage not in found] == []
    assert found["facts"][0] == found["build"][0] == "failed"
    assert "exit status 3" in found["build"][1]
    assert {found[stage][0] for stage in STAGES[2:]} == {"skipped"}


def test_no_gpu(repository, tmp_path):
    """Builds and imports, then says what it could not do: not a failure, not a success."""
    script = """
    for word in "$@"; do
      [ "$before" = --target ] && mkdir -p "$word/dlm_fast" && touch "$word/dlm_fast/__init__.py"
      before=$word
    done
    [[ "$*" != *"not torch.cuda.is_available"* ]]"""
    status, found = check(repository, tmp_path, script)
    assert status == 2
    assert found["build"][0] == found["import"][0] == "passed"
    for stage in ("kernels", "tests", "benchmarks"):
        assert found[stage] == ("skipped", "no CUDA device")


def test_a_stage_that_hangs_is_stopped(repository, tmp_path):
    hangs = '[[ "$*" == *pip* ]] && sleep 100; exit 0'
    status, found = check(repository, tmp_path, hangs, seconds=10)
    assert status == 1
    assert found["build"] == ("failed", "stopped after 4 s; logs/build.log")
    assert found["facts"][0] == "passed"
    assert found["benchmarks"][0] == "skipped"
