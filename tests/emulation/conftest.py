"""Every test of a kernel body runs in three thread orders and must have launched what it covers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from device_runs import Run, on_emulator

from dlm_fast.ops._executor import Emulated, emulated

_C_emulated = pytest.importorskip(
    "dlm_fast._C_emulated", reason="the emulator was not built (DLM_EMULATION=OFF)"
)


@pytest.fixture(params=Emulated.ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    """Of the threads and of the blocks."""
    return request.param


@pytest.fixture
def executor(order: str) -> Iterator[Emulated]:
    """Inside the test, ops on CPU tensors take the CUDA path."""
    with emulated(order, seed=7) as made:
        yield made


@pytest.fixture
def run(order: str) -> Run:
    """``run(op, ...)`` takes the CUDA path; outside of it ops take the CPU's."""
    return on_emulator(order)


@pytest.fixture(autouse=True)
def covered(request: pytest.FixtureRequest) -> Iterator[None]:
    """``@pytest.mark.covers("kernel")``: the test launches the kernel, on two blocks or more."""
    marker = request.node.get_closest_marker("covers")
    _C_emulated.forget_launches()
    yield
    if marker is None:
        return
    blocks = _C_emulated.launched_blocks()
    for kernel in marker.args:
        assert blocks.get(kernel, 0) >= 2, f"{kernel}: launched on {blocks.get(kernel, 0)} blocks"
