"""Where a call runs: one device for all its tensors, with somebody there to run kernels."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from dlm_fast.ops._executor import executor_of


def check_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors on one device, the CPU or a CUDA device that has an executor.

    Nothing is moved in silence: a copy between devices costs a wait.
    """
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    if all(tensor.is_cpu for _, tensor in given):
        return
    first_name, first = given[0]
    for name, tensor in given:
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"{op}: {name} lies on {tensor.device}; move it to the CPU or to a CUDA device"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} lies on {tensor.device} but {first_name} on {first.device}; "
                "move them to one device"
            )
    if not is_fake(first):
        executor_of(first.device)  # raises where there is none
