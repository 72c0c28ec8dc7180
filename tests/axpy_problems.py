"""Main gradients and gradients for the tests of axpy_multi, on the CPU and emulated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAIRS = [
    (main, grad)
    for main in (torch.float32, torch.bfloat16)
    for grad in (torch.float32, torch.bfloat16, torch.float16)
] + [(torch.float64, torch.float64)]
"""types of main gradient and gradient"""
SIZES = (0, 1, 7, 8, 63, 64, 65, 16384, 16385, 40000)
"""around a block, a chunk and several"""


def tensors(
    sizes: Sequence[int], main_dtype: torch.dtype, grad_dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return [draw(n, main_dtype) for n in sizes], [draw(n, grad_dtype) for n in sizes]
