"""One sample's gradients into main gradients in one pass, with their norm and inner product.

    factor = min(1, max_norm / ||g||)          over all tensors of the list together
    main  += factor * scale * g

A bfloat16 main gradient is rounded stochastically, by random numbers that have names: number e of
a tensor takes half ``e & 1`` of word ``(e >> 1) & 3`` of the Philox block with the tensor's key and
the counter ``(e >> 3, e >> 35, step, 0)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, check_dtype, extension, num_threads
from dlm_fast.ops._device import check_device
from dlm_fast.ops._executor import executor_of
from dlm_fast.ops._head_inputs import FLOAT_DTYPES
from dlm_fast.ops.philox import philox4x32_ref


def axpy_multi(
    mains: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: float = 1.0,
    *,
    max_norm: float = math.inf,
    square_elsewhere: float = 0.0,
    keys: Sequence[int] | None = None,
    step: int = 0,
) -> Tensor:
    """float64 [3]: ``||g||^2``, ``<g, main before>`` and the clip factor, over all tensors.

    ``mains`` are changed: float32, bfloat16 (``keys`` name the random numbers, one per tensor), or
    float64 for float64 gradients. ``square_elsewhere`` is the squared norm of a part of the sample
    that is not in the list; it counts for the clip factor only.
    """
    op = "axpy_multi"
    mains, grads = list(mains), list(grads)
    if len(mains) != len(grads):
        raise ValueError(f"{op}: {len(mains)} main gradients but {len(grads)} gradients")
    for index, (main, grad) in enumerate(zip(mains, grads, strict=True)):
        _check_pair(op, index, main, grad)
        check_device(op, **{"mains[0]": mains[0], f"mains[{index}]": main, f"grads[{index}]": grad})
    keys = [0] * len(mains) if keys is None else [int(key) for key in keys]
    if len(keys) != len(mains):
        raise ValueError(f"{op}: {len(mains)} tensors but {len(keys)} keys")
    if not max_norm > 0:
        raise ValueError(f"{op}: max_norm must be above 0, got {max_norm}")
    if not 0 <= step < 1 << 32:
        raise ValueError(f"{op}: step must lie in 0..2^32-1, got {step}")
    if not mains:  # a dispatcher finds no backend in an empty list
        return axpy_multi_ref((), (), max_norm=max_norm, square_elsewhere=square_elsewhere)
    with torch.no_grad():
        grads = [_in_layout_of(main, grad) for main, grad in zip(mains, grads, strict=True)]
        return _axpy_multi(
            mains, grads, float(scale), float(max_norm), float(square_elsewhere), keys, step
        )


def axpy_multi_ref(
    mains: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: float = 1.0,
    *,
    max_norm: float = math.inf,
    square_elsewhere: float = 0.0,
    keys: Sequence[int] | None = None,
    step: int = 0,
) -> Tensor:
    """The definition. Every backend must match it."""
    square, inner = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for main, grad in zip(mains, grads, strict=True):
        square += grad.double().square().sum()
        inner += (grad.double() * main.double()).sum()
    norm = (square + square_elsewhere).sqrt()
    factor = torch.where(norm <= max_norm, torch.ones_like(norm), max_norm / norm)
    if max_norm == math.inf:
        factor = torch.ones_like(norm)
    for index, (main, grad) in enumerate(zip(mains, grads, strict=True)):
        wide = torch.promote_types(main.dtype, torch.float32)
        total = main.to(wide) + (factor * scale).to(wide) * grad.to(wide)
        if main.dtype == torch.bfloat16:
            key = 0 if keys is None else keys[index]
            total = round_stochastically_ref(total, key, step)
        main.copy_(total)
    return torch.stack([square, inner, factor])


def round_stochastically_ref(numbers: Tensor, key: int, step: int) -> Tensor:
    """float32 -> bfloat16, up with the probability of the fraction that is cut off."""
    count = numbers.numel()
    block = torch.arange((count + 7) // 8)
    counter = (block, block >> 32, torch.full_like(block, step), torch.zeros_like(block))
    words = torch.stack(philox4x32_ref(counter, torch.full_like(block, key)), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten()[:count]
    # memory order, as the key names numbers by their place
    flat = torch.as_strided(numbers, (count,), (1,)).contiguous()
    bits = flat.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = torch.where(flat.isnan(), bits | 0x00400000, bits + halves) >> 16
    rounded = torch.where(rounded >= 1 << 15, rounded - (1 << 16), rounded).to(torch.int16)
    out = torch.empty_like(numbers, dtype=torch.bfloat16)
    torch.as_strided(out, (count,), (1,)).copy_(rounded.view(torch.bfloat16))
    return out


def _check_pair(op: str, index: int, main: Tensor, grad: Tensor) -> None:
    check_dtype(op, f"mains[{index}]", main, torch.float32, torch.bfloat16, torch.float64)
    check_dtype(op, f"grads[{index}]", grad, *FLOAT_DTYPES)
    if (main.dtype == torch.float64) != (grad.dtype == torch.float64):
        raise TypeError(
            f"{op}: mains[{index}] is {main.dtype} but grads[{index}] is {grad.dtype}; float64 "
            "goes with float64 alone"
        )
    if grad.layout != torch.strided:
        raise TypeError(
            f"{op}: grads[{index}] has layout {grad.layout}; sparse gradients are not supported: "
            "make them dense (nn.Embedding(sparse=False))"
        )
    if main.shape != grad.shape:
        raise ValueError(
            f"{op}: mains[{index}] has shape {tuple(main.shape)} but grads[{index}] has "
            f"{tuple(grad.shape)}"
        )
    if not main.is_contiguous() and torch.empty_like(main).stride() != main.stride():
        raise ValueError(
            f"{op}: mains[{index}] has strides {main.stride()}, which leave gaps or overlap; it "
            "must fill its memory"
        )
    if main.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: mains[{index}] is written in place and must not require grad")


def _in_layout_of(main: Tensor, grad: Tensor) -> Tensor:
    """Kernels pair numbers in the order of memory."""
    if main.stride() == grad.stride() or (main.is_contiguous() and grad.is_contiguous()):
        return grad
    return torch.empty_like(main, dtype=grad.dtype).copy_(grad)


@torch.library.custom_op(
    "dlm_fast::axpy_multi", mutates_args=("mains",), device_types=("cpu", "cuda")
)
def _axpy_multi(
    mains: list[Tensor],
    grads: list[Tensor],
    scale: float,
    max_norm: float,
    square_elsewhere: float,
    keys: list[int],
    step: int,
) -> Tensor:
    device = mains[0].device
    result = torch.empty(3, dtype=torch.float64, device=device)
    tensors = [
        (
            *addresses(main, grad),
            main.numel(),
            FLOAT_DTYPES.index(main.dtype),
            FLOAT_DTYPES.index(grad.dtype),
            key,
        )
        for main, grad, key in zip(mains, grads, keys, strict=True)
    ]
    how = (scale, max_norm, square_elsewhere, step)
    executor = executor_of(device)
    if executor is None:
        extension().axpy_multi_cpu(tensors, *how, *addresses(result), num_threads())
        return result
    chunks = extension().axpy_chunks(tensors)
    partial = torch.empty(2, chunks, dtype=torch.float64, device=device)
    for plan in extension().plan_axpy_multi(tensors, *how, *addresses(partial, result)):
        executor.launch(plan, device)
    return result


@_axpy_multi.register_fake
def _(
    mains: list[Tensor],
    grads: list[Tensor],
    scale: float,
    max_norm: float,
    square_elsewhere: float,
    keys: list[int],
    step: int,
) -> Tensor:
    device = mains[0].device if mains else None
    return torch.empty(3, dtype=torch.float64, device=device)
