"""Where a call runs: one device for all its tensors, with somebody there to run kernels."""

from __future__ import annotations

from torch import Tensor

from dlm_fast.ops._executor import executor_of


def check_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors on one device: the CPU, or a CUDA device with an executor.

    Nothing is moved in silence: a copy between devices costs a wait.
    """
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given:
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} lies on {tensor.device} but {first_name} on {first.device}; "
                f"move it with .to({str(first.device)!r})"
            )
    if first.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            f"{op}: got tensors on {first.device}, but the op runs on the CPU and on CUDA devices; "
            "move them to one"
        )
    if first.is_cuda:
        executor_of(first.device)  # raises where there is none
