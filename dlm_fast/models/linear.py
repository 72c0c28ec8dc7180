"""Linear layers whose float32 products on a CPU go through oneDNN.

torch sends float32 products to the BLAS it was built with, which reaches 0.4 of the peak of AMD
cores; oneDNN, which torch carries for 16-bit numbers, reaches 0.8. Same arithmetic, same precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_MIN_ROWS = 256
"""below, the layers' own time hides the difference"""


class Linear(nn.Linear):
    """``nn.Linear`` in all but speed."""

    @staticmethod
    def like(layer: nn.Linear) -> Linear:
        """With the parameters of ``layer``."""
        made = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        if not _gains(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        return _OneDnnLinear.apply(input, self.weight, self.bias)


def _gains(input: Tensor, weight: Tensor) -> bool:
    return (
        input.dtype == weight.dtype == torch.float32
        and input.device.type == "cpu"
        and type(weight.data) is Tensor  # not one sharded over processes
        and input.numel() >= _MIN_ROWS * max(1, input.shape[-1])
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _available()
    )


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left rightᵀ, plus bias."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_ND, input_ND = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        return (
            _product(grad_ND, weight.t()).view(input.shape) if needs[0] else None,
            _product(grad_ND.t(), input_ND.t()) if needs[1] else None,
            grad_ND.sum(0) if needs[2] else None,
        )
