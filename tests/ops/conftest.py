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
        metafunc.fixturenames.append("backend")
        metafunc.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Inside, new tensors lie where the backend computes."""
    if request.param == "emulated":
        with emulated("reverse"):
            yield request.param
    elif request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        with torch.device("cuda"):
            yield request.param
    else:
        yield request.param
