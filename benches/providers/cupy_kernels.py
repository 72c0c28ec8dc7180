"""Our CUDA kernels compiled by CuPy instead of nvcc: the same bodies, the third executor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

from dlm_fast.benchmark.providers import OURS, Provider, ours
from providers.availability import needs_cuda

WORKS = ("score", "statistics", "gradients", "weighted_step", "step", "decode")


def provider(device: str) -> Provider:
    unavailable = needs_cuda(device, "cupy")
    made = dataclasses.replace(
        ours(), name=f"{OURS}, CuPy kernels", what="our ops, kernels compiled by CuPy"
    )
    if unavailable is not None:
        return dataclasses.replace(made, unavailable=unavailable)
    executor = _executor()
    return dataclasses.replace(
        made, **{work: _run_by(executor, getattr(made, work)) for work in WORKS}
    )


def _executor() -> Any:
    import cupy

    from dlm_fast.ops._cupy_executor import CuPy

    return CuPy(cupy)


def _run_by(executor: Any, work: Callable[..., Any]) -> Callable[..., Any]:
    """The work with this executor in force; torch's build stays the default outside."""
    from dlm_fast.ops import _executor as executors

    @functools.wraps(work)
    def run(*arguments: Any) -> Any:
        with mock.patch.object(executors, "cuda_executor", lambda: executor):
            return work(*arguments)

    return run
