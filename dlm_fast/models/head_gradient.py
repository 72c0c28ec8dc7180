"""Adds the gradient of the head to a main gradient during the forward pass.

Autograd would make a gradient [V, D] for every micro-batch, and add it to the last one's. Where the
weights of the objective are known before the forward pass, the fused op adds to a buffer instead.

T packed rows, N selected rows, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops import weighted_logprob_


class HeadGradient:
    """Set as ``Head.gradient`` for the micro-batches of one optimizer step."""

    def __init__(self, buffer_VD: Tensor) -> None:
        """``buffer_VD``: float32 (float64 for float64 weights), what is added to."""
        self.buffer_VD = buffer_VD
        self.open = 0
        """objectives whose backward pass has not come yet"""
        self._cast: Tensor | None = None

    def weight(self, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight, detached; its copy in 16 bits is made once per optimizer step."""
        if weight_VD.dtype == dtype:
            return weight_VD.detach()
        if self._cast is None or self._cast.dtype != dtype:
            self._cast = weight_VD.detach().to(dtype)
        return self._cast

    def check_closed(self) -> None:
        """Raises if an objective was computed whose gradient the loss did not take."""
        if self.open:
            raise RuntimeError(
                f"{self.open} forward passes asked for a term of the loss (ScoreRequest.in_loss) "
                "that the loss does not contain; its gradient is already in the sum. Leave in_loss "
                "out, or run such passes under torch.no_grad()"
            )


def objective_in_place(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    gradient: HeadGradient,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """``objective``, differentiable in ``hidden_TD`` alone, and ``logprob`` [N]."""
    inputs = (gradient.weight(weight_VD, hidden_TD.dtype), targets_N, weights_N, options)
    return _Objective.apply(hidden_TD, gradient, *inputs)


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        gradient: HeadGradient,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        objective, logprob_N, hidden_grad_TD = weighted_logprob_(
            hidden_TD,
            weight_VD,
            targets_N,
            weights_N,
            weight_grad=gradient.buffer_VD,
            **options,
        )
        ctx.save_for_backward(hidden_grad_TD)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(logprob_N)
        ctx.set_materialize_grads(False)
        gradient.open += 1
        return objective, logprob_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        if grad.is_cuda:  # no wait for the device
            torch._assert_async(grad == 1)
        elif grad != 1:
            raise RuntimeError(
                f"the gradient of a term of the loss (ScoreRequest.in_loss) is {float(grad):g}, "
                "not 1, but the head's gradient was added to the sum before; put signs and scales "
                "into the weights of the request, or leave in_loss out"
            )
        ctx.gradient.open -= 1
        return (ctx.saved_tensors[0], *(None,) * 5)
