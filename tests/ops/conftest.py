"""Backends that the tests of the ops run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dlm_fast.ops._executor import emulated

BACKENDS = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.cuda)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.every_backend``: the test runs on the CPU, the emulator and a CUDA device."""
    if metafunc.definition.get_closest_marker("every_backend"):
        metafunc.parametrize("backend", BACKENDS, indirect=True)


# For every test: pytest drops a fixture that only a hook asks for, and runs the test without it.
@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Inside, new tensors lie where the backend computes."""
    chosen = getattr(request, "param", "cpu")
    if chosen == "emulated":
        with emulated("reverse"):
            yield chosen
    elif chosen == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        with torch.device("cuda"):
            yield chosen
    else:
        yield chosen
