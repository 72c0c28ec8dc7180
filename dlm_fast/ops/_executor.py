"""Who runs the CUDA kernel bodies: nvcc's build in the extension, CuPy, or, in tests, the emulator.

A plan is ``(kernel, (grid_x, grid_y), threads, cluster, shared_bytes, params)``, made by the
extension's ``plan_*`` functions; every kernel takes one struct of plain data by value.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from dlm_fast.ops._common import CUDA_WAYS, extension

Plan = tuple[str, tuple[int, int], int, int, int, bytes]


class Executor(Protocol):
    """Starts planned launches."""

    name: str

    def launch(self, plan: Plan, device: torch.device) -> None:
        """On torch's current stream of the device, whatever the current device is; no wait."""
        ...


class BuiltIn:
    """Kernels that nvcc compiled into the extension."""

    name = "built in (nvcc)"

    def __init__(self, module: Any) -> None:
        self._launch = module.cuda_launch

    def launch(self, plan: Plan, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._launch(plan, torch.cuda.current_stream(device).cuda_stream)


class Emulated:
    """Kernel bodies run thread by thread on the CPU: a test device."""

    name = "emulated"
    ORDERS = ("forward", "reverse", "random")

    def __init__(self, order: str = "forward", seed: int = 0, clusters: bool = True) -> None:
        from dlm_fast import _C_emulated  # type: ignore[attr-defined]

        self._module = _C_emulated
        self._setting = (self.ORDERS.index(order), seed)
        self.clusters = clusters

    def launch(self, plan: Plan, device: torch.device) -> None:
        self._module.set_order(*self._setting)
        self._module.cuda_launch(plan, 0)


_emulator: contextvars.ContextVar[Emulated | None] = contextvars.ContextVar(
    "emulator", default=None
)


@contextlib.contextmanager
def emulated(order: str = "forward", seed: int = 0, clusters: bool = True) -> Iterator[Emulated]:
    """Inside, ops on CPU tensors take the whole CUDA path on the emulator. For tests."""
    executor = Emulated(order, seed, clusters)
    token = _emulator.set(executor)
    try:
        yield executor
    finally:
        _emulator.reset(token)


def has_clusters(executor: Executor, device: torch.device) -> bool:
    """Whether the device starts clusters of blocks (sm_90 and later)."""
    if isinstance(executor, Emulated):
        return executor.clusters
    return torch.cuda.get_device_capability(device) >= (9, 0)


def runs_on_cpu(device: torch.device) -> bool:
    """Whether the C++ backend computes, not the emulator; asks for no executor."""
    return device.type == "cpu" and _emulator.get() is None


def executor_of(device: torch.device) -> Executor | None:
    """None: the C++ backend of the CPU. Raises where a CUDA device has no executor."""
    if device.type == "cpu":
        return _emulator.get()
    try:
        return cuda_executor()
    except ImportError as error:
        raise ValueError(
            f"got a tensor on {device}, but nothing here can run the CUDA kernels of dlm_fast: "
            f"{error}; move the tensors to the CPU, or {CUDA_WAYS}"
        ) from error


@functools.cache
def cuda_executor() -> Executor:
    """What runs kernels on CUDA devices here. Raises ImportError, saying what is missing."""
    module = extension()
    if hasattr(module, "cuda_launch"):
        return BuiltIn(module)
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"the extension was built without nvcc, and CuPy cannot be imported ({error})"
        ) from error
    from dlm_fast.ops._cupy_executor import CuPy

    return CuPy(cupy)
