"""Main gradients and gradients for the tests of axpy_multi, on the CPU and emulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops import axpy_multi, axpy_multi_ref

PAIRS = [
    (main, grad)
    for main in (torch.float32, torch.bfloat16)
    for grad in (torch.float32, torch.bfloat16, torch.float16)
] + [(torch.float64, torch.float64)]
"""types of main gradient and gradient"""
SIZES = (0, 1, 7, 8, 63, 64, 65, 16383, 16384, 16385, 40000)
"""around a block, a chunk and several"""


def tensors(
    sizes: Sequence[int], main_dtype: torch.dtype, grad_dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return [draw(n, main_dtype) for n in sizes], [draw(n, grad_dtype) for n in sizes]


TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 1e-2, torch.float64: 1e-14}


def check(
    run: Any, mains: list[Tensor], grads: list[Tensor], scale: float, **options: Any
) -> Tensor:
    """``run(op, mains, grads, ...)`` leaves in ``mains`` what the op made of them."""
    expected = [main.clone() for main in mains]
    result = run(axpy_multi, mains, grads, scale, **options)
    exact = axpy_multi_ref(expected, grads, scale, **options)
    assert torch.allclose(result, exact, rtol=1e-12, atol=1e-9)
    for ours, truth in zip(mains, expected, strict=True):
        limit = TOLERANCE[ours.dtype]  # a fused multiply-add may round otherwise
        assert torch.allclose(ours, truth, rtol=limit, atol=limit)
    return result
