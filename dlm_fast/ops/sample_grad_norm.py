"""Squared norm of each sample's weight gradient of a linear layer, without that gradient.

For y = x Wᵀ and the rows of sample k, dW_k = Σ_i dy_iᵀ x_i and

    ||dW_k||² = Σ_{i,j in k} (dy_i·dy_j)(x_i·x_j)         «gram»,  T²(Din+Dout) flop by symmetry
              = sum of squares of dW_k, tile by tile      «direct», 2 T Din Dout flop

No T x T matrix and no gradient reaches memory, but for one tile of them at a time on CUDA. ``auto``
takes gram iff T < Din·Dout/(Din+Dout).
Letters: ``N`` rows of all samples, ``K`` samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, check_dtype, extension, num_threads
from dlm_fast.ops._cuda_norms import sample_squares
from dlm_fast.ops._device import check_device
from dlm_fast.ops._executor import executor_of
from dlm_fast.ops._head_inputs import FLOAT_DTYPES, unit_stride

METHODS = ("auto", "gram", "direct")
"""in the order of the C++ side's numbers"""


def sample_grad_norm(
    grad_output: Tensor, input: Tensor, starts: Tensor | Sequence[int], *, method: str = "auto"
) -> Tensor:
    """float64 [K] on their device: squared norms of the gradients of ``weight`` in
    ``linear(input, weight)``.

    ``grad_output`` [N, Dout] and ``input`` [N, Din] may have different types; sample k has the rows
    ``starts[k]`` to ``starts[k+1]``, so ``starts`` has K+1 entries that do not fall.
    """
    starts_K = _check(grad_output, input, starts, method)
    with torch.no_grad():
        return _sample_grad_norm(grad_output, input, starts_K, METHODS.index(method))


def sample_grad_norm_ref(
    grad_output: Tensor, input: Tensor, starts: Tensor | Sequence[int]
) -> Tensor:
    """The definition, in float64."""
    bounds = torch.as_tensor(starts).tolist()
    squares = [
        (grad_output[a:b].double().t() @ input[a:b].double()).square().sum()
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.stack(squares) if squares else torch.zeros(0, dtype=torch.float64)


def check_starts(op: str, starts: Tensor | Sequence[int], num_rows: int) -> Tensor:
    """int64 [K+1] on the CPU, not falling, within the rows."""
    if isinstance(starts, Tensor):
        check_dtype(op, "starts", starts, torch.int64, torch.int32)
    bounds_K = torch.as_tensor(starts, dtype=torch.int64).cpu().contiguous()
    if bounds_K.dim() != 1 or bounds_K.numel() == 0:
        raise ValueError(
            f"{op}: starts must have shape [K+1], the first row of each sample and the end of the "
            f"last, got {tuple(bounds_K.shape)}"
        )
    if bool((bounds_K.diff() < 0).any()):
        raise ValueError(f"{op}: starts must not fall, got {bounds_K.tolist()}")
    if int(bounds_K[0]) < 0 or int(bounds_K[-1]) > num_rows:
        raise ValueError(
            f"{op}: starts go from {int(bounds_K[0])} to {int(bounds_K[-1])}, but there are rows "
            f"0 to {num_rows - 1} only"
        )
    return bounds_K


def _check(
    grad_output: Tensor, input: Tensor, starts: Tensor | Sequence[int], method: str
) -> Tensor:
    op = "sample_grad_norm"
    for name, matrix in (("grad_output", grad_output), ("input", input)):
        check_dtype(op, name, matrix, *FLOAT_DTYPES)
        if matrix.dim() != 2:
            raise ValueError(
                f"{op}: {name} must have shape [N, D], got {tuple(matrix.shape)}; flatten leading "
                "dimensions first"
            )
    check_device(op, grad_output=grad_output, input=input)
    if (grad_output.dtype == torch.float64) != (input.dtype == torch.float64):
        raise TypeError(
            f"{op}: grad_output is {grad_output.dtype} but input is {input.dtype}; float64 goes "
            "with float64 alone"
        )
    if len(grad_output) != len(input):
        raise ValueError(
            f"{op}: grad_output has {len(grad_output)} rows but input has {len(input)}"
        )
    if method not in METHODS:
        raise ValueError(f"{op}: method must be one of {METHODS}, got {method!r}")
    return check_starts(op, starts, len(input))


@torch.library.custom_op(
    "dlm_fast::sample_grad_norm", mutates_args=(), device_types=("cpu", "cuda")
)
def _sample_grad_norm(grad_output: Tensor, input: Tensor, starts: Tensor, method: int) -> Tensor:
    executor = executor_of(input.device)
    if executor is not None:
        return sample_squares(executor, grad_output, input, starts, METHODS[method])
    grad_output, input = unit_stride(grad_output), unit_stride(input)
    square_K = torch.empty(starts.numel() - 1, dtype=torch.float64)
    extension().sample_grad_norm_cpu(
        (
            starts.numel() - 1,
            grad_output.shape[1],
            input.shape[1],
            grad_output.stride(0),
            input.stride(0),
        ),
        (FLOAT_DTYPES.index(grad_output.dtype), FLOAT_DTYPES.index(input.dtype)),
        method,
        addresses(grad_output, input, starts, square_K),
        num_threads(),
    )
    return square_K


@_sample_grad_norm.register_fake
def _(grad_output: Tensor, input: Tensor, starts: Tensor, method: int) -> Tensor:
    return grad_output.new_empty(starts.shape[0] - 1, dtype=torch.float64)
