"""The CUDA path of samples' gradient norms: tiles by torch, sums by the accumulator's kernels.

What exists at a time is a tile of each matrix product, never a whole Gram matrix or gradient.
Letters: ``N`` rows of all samples, ``T`` of one sample, ``K`` samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops._executor import Executor
from dlm_fast.ops._gemm import product
from dlm_fast.ops._head_inputs import FLOAT_DTYPES

TILE_ROWS = 1024
"""rows and columns of a tile of the Gram matrices"""
TILE_BYTES = 64 << 20
"""of a tile of the weight gradient"""


def sample_squares(
    executor: Executor, grad_output: Tensor, input: Tensor, starts: Tensor, method: str
) -> Tensor:
    """float64 [K], on the device; ``starts`` [K+1] on the CPU. Nothing waits for the device."""
    bounds = starts.tolist()
    square_K = torch.zeros(len(bounds) - 1, dtype=torch.float64, device=input.device)
    if grad_output.dtype != input.dtype:
        grad_output, input = grad_output.float(), input.float()
    for k, (first, end) in enumerate(pairwise(bounds)):
        own = grad_output[first:end], input[first:end]
        if 0 in (*own[0].shape, *own[1].shape):
            continue
        tiles = _gram_tiles(*own) if _takes_gram(method, *own) else _gradient_tiles(*own)
        for left, right, count in tiles:
            square_K[k] += count * _inner(executor, left, right)
    return square_K


def _takes_gram(method: str, grad_TO: Tensor, input_TI: Tensor) -> bool:
    width_out, width_in = grad_TO.shape[1], input_TI.shape[1]
    cheaper = len(grad_TO) * (width_out + width_in) < width_out * width_in
    return method == "gram" or (method == "auto" and cheaper)


def _gram_tiles(grad_TO: Tensor, input_TI: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Tiles of both Gram matrices on and above the diagonal, and how often each counts."""
    blocks = [slice(i, i + TILE_ROWS) for i in range(0, len(grad_TO), TILE_ROWS)]
    for i, row in enumerate(blocks):
        for column in blocks[i:]:
            left, right = (product(x[row], x[column].t()) for x in (grad_TO, input_TI))
            yield left, right, 1 if column is row else 2


def _gradient_tiles(grad_TO: Tensor, input_TI: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    step = max(1, TILE_BYTES // (4 * input_TI.shape[1]))
    for first in range(0, grad_TO.shape[1], step):
        tile = product(grad_TO[:, first : first + step].t(), input_TI)
        yield tile, tile, 1


def _inner(executor: Executor, left: Tensor, right: Tensor) -> Tensor:
    """Sum of the products of their numbers, in float64, in an order that is always the same."""
    number = FLOAT_DTYPES.index(left.dtype)
    tensors = [(*addresses(left, right), left.numel(), number, number, 0)]
    partial = left.new_empty(2, extension().axpy_chunks(tensors), dtype=torch.float64)
    result = left.new_empty(3, dtype=torch.float64)
    # adding nothing of one to the other: the kernel's inner product comes with it
    how = (0.0, float("inf"), 0.0, 0)
    for plan in extension().plan_axpy_multi(tensors, *how, *addresses(partial, result)):
        executor.launch(plan, left.device)
    return result[1]
