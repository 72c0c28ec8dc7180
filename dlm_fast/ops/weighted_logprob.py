"""Weighted sum of target log-probabilities, whose gradient is known as soon as it is computed.

    objective = sum over rows of row_weight * logprob

Because the weights are constants, the forward pass already has every cotangent: it computes the
gradients of hidden states and head in the same sweep over the vocabulary.
Letters: ``T`` rows of hidden states, ``D`` width, ``V`` vocabulary, ``N`` selected rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops._cuda_head import Cotangents, Gradients, HeadCall, gradients
from dlm_fast.ops._head_inputs import (
    bound_inputs,
    check_gradient,
    check_head_inputs,
    check_row_weight,
    check_temperature,
    output_dtype,
    unit_stride,
)
from dlm_fast.ops.token_logprob import (
    cuda_call,
    empty_gradients,
    empty_hidden_gradient,
    token_logprob_ref,
)


class WeightedLogprob(NamedTuple):
    """Objective and its parts."""

    objective: Tensor
    """scalar, differentiable"""
    logprob: Tensor
    """[N], detached"""


def weighted_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
) -> WeightedLogprob:
    """``objective`` is differentiable in ``hidden``, ``weight`` and ``bias``.

    Arguments as in ``token_logprob``; ``row_weight`` [N] is a constant of any sign; a row of weight
    0 takes no part, whatever its values are. Signs and scales belong into ``row_weight``: where the
    objective is the loss itself, the gradient of the head is handed on as it is.
    """
    op = "weighted_logprob"
    checked = check_head_inputs(op, hidden, weight, targets, rows, bias, forbid_ids)
    assert checked.targets_N is not None
    tensors = (checked.hidden_TD, checked.weight_VD, checked.bias_V)
    objective, logprob_N, *_ = _weighted_logprob(
        checked.hidden_TD,
        checked.weight_VD,
        checked.targets_N,
        check_row_weight(op, row_weight, checked.targets_N, output_dtype(hidden.dtype)),
        checked.rows_N,
        checked.bias_V,
        check_temperature(op, temperature),
        checked.forbid_ids,
        [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors],
    )
    return WeightedLogprob(objective, logprob_N.detach())


def weighted_logprob_(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    *,
    weight_grad: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw form without autograd: returns ``(objective, logprob, hidden_grad)``.

    Adds ``alpha`` times the gradient of the head to ``weight_grad`` (and ``bias_grad``) in place;
    ``hidden_grad`` [T, D] is not scaled by ``alpha``.
    """
    op = "weighted_logprob_"
    with torch.no_grad():
        checked = check_head_inputs(op, hidden, weight, targets, rows, bias, forbid_ids)
        assert checked.targets_N is not None
        dtype = output_dtype(hidden.dtype)
        check_gradient(op, "weight_grad", weight_grad, "weight", weight, dtype)
        if bias_grad is not None:
            if bias is None:
                raise ValueError(f"{op}: bias_grad is given but there is no bias")
            check_gradient(op, "bias_grad", bias_grad, "bias", bias, dtype)
        return _weighted_logprob_(
            checked.hidden_TD,
            checked.weight_VD,
            checked.targets_N,
            check_row_weight(op, row_weight, checked.targets_N, dtype),
            checked.rows_N,
            checked.bias_V,
            check_temperature(op, temperature),
            checked.forbid_ids,
            weight_grad,
            bias_grad,
            float(alpha),
        )


def weighted_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
) -> WeightedLogprob:
    """The definition, differentiable."""
    logprob_N = token_logprob_ref(
        hidden,
        weight,
        targets,
        rows=rows,
        bias=bias,
        temperature=temperature,
        forbid_ids=forbid_ids,
    ).logprob
    objective = (row_weight.to(logprob_N.dtype) * logprob_N).sum()
    return WeightedLogprob(objective, logprob_N.detach())


def weighted_logprob_ref_(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    *,
    weight_grad: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of the raw form."""
    with torch.enable_grad():
        leaves = [hidden, weight] + ([] if bias is None else [bias])
        leaves = [leaf.detach().to(output_dtype(hidden.dtype)).requires_grad_() for leaf in leaves]
        result = weighted_logprob_ref(
            leaves[0],
            leaves[1],
            targets,
            row_weight,
            rows=rows,
            bias=None if bias is None else leaves[2],
            temperature=temperature,
            forbid_ids=forbid_ids,
        )
        grads = torch.autograd.grad(result.objective, leaves)
    weight_grad.add_(grads[1], alpha=alpha)
    if bias_grad is not None:
        bias_grad.add_(grads[2], alpha=alpha)
    return result.objective.detach(), result.logprob, grads[0].to(hidden.dtype)


@torch.library.custom_op("dlm_fast::weighted_logprob", mutates_args=())
def _weighted_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """objective, logprob, and the gradients of hidden, weight and bias, empty where not wanted."""
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    objective, logprob_N = _empty_values(hidden, targets)
    made = empty_gradients(hidden, weight, wanted)
    wanted_only = [g if want else None for g, want in zip(made, wanted, strict=True)]
    call = cuda_call(hidden, weight, targets, rows, bias, temperature, forbid_ids)
    if call is not None:
        results = Gradients(wanted_only[0], wanted_only[1], wanted_only[2])
        _step(call, row_weight, objective, logprob_N, results)
    else:
        extension().weighted_logprob_cpu(
            bound_inputs(hidden, weight, targets, rows, bias, temperature, forbid_ids),
            *addresses(row_weight, objective, logprob_N),
            addresses(*wanted_only),
            False,
            1.0,
        )
    return objective, logprob_N, *made


def _step(
    call: HeadCall, row_weight: Tensor, objective: Tensor, logprob_N: Tensor, results: Gradients
) -> None:
    """The CUDA path of both forms."""
    gradients(call, {"logprob": logprob_N}, Cotangents(row_weight), results, known=False)
    # a row of weight zero takes no part, whatever its values are
    terms_N = torch.where(row_weight == 0, 0.0, row_weight.double() * logprob_N)
    objective.copy_(terms_N.sum())


def _empty_values(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = output_dtype(hidden.dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(targets.shape, dtype=dtype)


@_weighted_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_empty_values(hidden, targets), *empty_gradients(hidden, weight, wanted)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    needs = ctx.needs_input_grad
    hidden, weight, bias = ctx.saved_tensors
    if not is_one(grad):
        hidden, weight, bias = hidden * grad, weight * grad, bias * grad
    return (
        hidden.to(ctx.dtypes[0]) if needs[0] else None,
        weight.to(ctx.dtypes[1]) if needs[1] else None,
        *(None, None, None),
        bias if needs[5] else None,
        *(None, None, None),
    )


def is_one(grad: Tensor) -> bool:
    """True for an objective that is the loss itself: then no [V, D] product is needed.

    Asked only where the answer costs no wait for a device and no graph break.
    """
    if grad.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(grad):
        return False
    return bool(grad == 1)


_weighted_logprob.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("dlm_fast::weighted_logprob_", mutates_args=("weight_grad", "bias_grad"))
def _weighted_logprob_(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    objective, logprob_N = _empty_values(hidden, targets)
    call = cuda_call(hidden, weight, targets, rows, bias, temperature, forbid_ids)
    hidden_grad = empty_hidden_gradient(hidden, call)
    if call is not None:
        results = Gradients(hidden_grad, weight_grad, bias_grad, accumulate=True, alpha=alpha)
        _step(call, row_weight, objective, logprob_N, results)
    else:
        extension().weighted_logprob_cpu(
            bound_inputs(hidden, weight, targets, rows, bias, temperature, forbid_ids),
            *addresses(row_weight, objective, logprob_N),
            addresses(hidden_grad, weight_grad, bias_grad),
            True,
            alpha,
        )
    return objective, logprob_N, hidden_grad.to(hidden.dtype)


@_weighted_logprob_.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty_values(hidden, targets), hidden.new_empty(hidden.shape)
