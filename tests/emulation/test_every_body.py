"""No kernel body without a test, in three thread orders; every executor knows the same kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlm_fast import _C, _C_emulated
from dlm_fast.ops._cupy_executor import CuPy
from dlm_fast.ops._executor import Emulated

HERE = Path(__file__).parent
BODIES: dict[str, list[str]] = _C_emulated.cuda_kernels()
# Prints the kernels and thread orders that the collected tests cover.
COLLECT = """
import json, sys, pytest

class Covered:
    def pytest_collection_finish(self, session):
        found = set()
        for item in session.items:
            marker = item.get_closest_marker("covers")
            order = item.callspec.params.get("order") if hasattr(item, "callspec") else None
            found |= {(kernel, order) for kernel in marker.args} if marker else set()
        with open(sys.argv[2], "w") as file:
            json.dump(sorted(found, key=str), file)

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", sys.argv[1]], [Covered()]))
"""


@pytest.fixture(scope="module")
def covered(tmp_path_factory) -> set[tuple[str, str]]:
    file = tmp_path_factory.mktemp("covered") / "covered.json"
    command = [sys.executable, "-P", "-c", COLLECT, str(HERE), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    return {(kernel, order) for kernel, order in json.loads(file.read_text())}


@pytest.mark.parametrize("order", Emulated.ORDERS)
def test_every_kernel_is_covered_in_every_order(covered, order):
    kernels = {kernel for kernels in BODIES.values() for kernel in kernels}
    tested = {kernel for kernel, with_order in covered if with_order == order}
    assert kernels - tested == set(), "no test with @pytest.mark.covers runs them"
    assert tested - kernels == set(), "tests cover kernels that do not exist"


@pytest.mark.parametrize("body", BODIES)
def test_every_body_has_a_test_file(body):
    assert (HERE / f"test_{body}.py").is_file()


def test_every_executor_knows_the_same_kernels():
    assert BODIES and all(BODIES.values())
    cupy = CuPy(None)
    for body, kernels in BODIES.items():
        assert sorted(cupy.entry_points(body)) == sorted(kernels)
    if not hasattr(_C, "cuda_kernels"):
        return
    assert sorted(_C.cuda_kernels()) == sorted(k for kernels in BODIES.values() for k in kernels)


def test_no_two_bodies_share_a_name():
    names = [kernel for kernels in BODIES.values() for kernel in kernels]
    assert len(set(names)) == len(names)
