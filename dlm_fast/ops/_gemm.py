"""The matrix products of the CUDA path: the one place where torch multiplies.

16-bit factors, float32 sums and results, which torch offers on CUDA alone; on CPU tensors, in the
tests, the same products of widened factors. float32 and float64 stay what they are.
Letters: ``N`` rows, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def head_logits(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> None:
    """``out = hidden weight^T``."""
    _multiply(hidden_ND, weight_VD.t(), out_NV)


def hidden_gradient(logits_grad_NV: Tensor, weight_VD: Tensor, out_ND: Tensor) -> None:
    """``out = dZ weight``."""
    _multiply(logits_grad_NV, weight_VD, out_ND)


def add_weight_gradient(
    weight_grad_VD: Tensor, logits_grad_NV: Tensor, hidden_ND: Tensor, alpha: float, *, keep: bool
) -> None:
    """``weight_grad = keep * weight_grad + alpha dZ^T hidden``, in place."""
    out = weight_grad_VD
    left, right, wide = _factors(logits_grad_NV.t(), hidden_ND, out)
    torch.addmm(out, left, right, beta=float(keep), alpha=alpha, out=out, **wide)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left right``, wide."""
    dtype = torch.float32 if left.dtype in HALVES else left.dtype
    out = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    _multiply(left, right, out)
    return out


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    left, right, wide = _factors(left, right, out)
    torch.mm(left, right, out=out, **wide)


def _factors(left: Tensor, right: Tensor, out: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Factors, and how to ask for a wider result than theirs."""
    if left.dtype == out.dtype:
        return left, right, {}
    if left.is_cuda:
        return left, right, {"out_dtype": out.dtype}
    return left.to(out.dtype), right.to(out.dtype), {}
