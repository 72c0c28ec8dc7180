"""What every op needs at the border to the extension: the module, addresses, device check."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

# How a machine with a GPU gets kernels; the end of every refusal.
CUDA_WAYS = (
    "rebuild where nvcc is found (pip install . -C cmake.define.DLM_CUDA=ON), or install the extra "
    "dlm_fast[cupy13] or dlm_fast[cupy12], which compiles the kernels at first use; "
    "`dlm-fast info` shows what is in force"
)


def extension() -> ModuleType:
    """The compiled module, with an error that helps where it is missing."""
    try:
        from dlm_fast import _C  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(
            f"the compiled part of dlm_fast cannot be imported ({error}); "
            "install the package with `pip install .` from its root"
        ) from error
    return _C


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Data pointers for the extension; 0 where there is no tensor."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def num_threads() -> int:
    """Threads of a C++ call: those the user gave to torch."""
    return torch.get_num_threads()


def refuse_cuda(op: str, *tensors: Tensor | None) -> None:
    """Raises for tensors on a GPU: a silent copy to the CPU would hide the cost."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            raise ValueError(
                f"{op}: got a tensor on {tensor.device}, but this version of dlm_fast has no CUDA "
                "kernel for this op yet; move the tensors to the CPU. For ops that have one, "
                f"{CUDA_WAYS}"
            )


def check_dtype(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {allowed}, got {tensor.dtype}; convert it first")
