"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch
from llada_directory import write_llada_directory
from strong_weights import strengthen

from dlm_fast import load

if "PYTEST_XDIST_WORKER" in os.environ:
    # several test processes share the cores; threads that wait for each other would slow all down
    torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree; tests import the installed package, but some read sources."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real test data beside the repository; tests that need it are skipped without it."""
    data = REPOSITORY.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("real test data is absent: no ../shared/data beside the repository")
    return data


@pytest.fixture
def llada_directory(tmp_path) -> Path:
    """A checkpoint in LLaDA's format with a tokenizer; ``write_llada_directory`` makes variants."""
    return write_llada_directory(tmp_path / "llada")


@pytest.fixture
def tiny_policy():
    """The built-in model, small, in float32."""
    return load("tiny", width=32, layers=2, heads=4)


@pytest.fixture
def exact_policy():
    """The built-in model, small, in float64, its weights larger than a new model's."""
    return strengthen(load("tiny", dtype="float64", width=16, layers=2, heads=2), 0.2)
