"""Tests on a real CUDA device: ``pytest tests/cuda -m cuda``. All of them skip without one."""

from __future__ import annotations

import pytest
import torch
from device_runs import Run, on_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def run(device: torch.device) -> Run:
    """``run(op, ...)`` takes CPU tensors to the device and results back."""
    return on_device(device)
