"""Log-probability of one target token per selected row of a language-model head.

    z = (hidden[rows] @ weight.T + bias) / temperature        minus infinity where forbidden
    lse = ln sum exp z      logprob = z[target] - lse      entropy = -sum p ln p, p = exp(z - lse)

Letters: ``T`` rows of hidden states, ``D`` width, ``V`` vocabulary, ``N`` selected rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops._cuda_head import Cotangents, Gradients, HeadCall, gradients, statistics
from dlm_fast.ops._cuda_tokens import TokenDraw, choose_tokens, reads_head_directly
from dlm_fast.ops._executor import executor_of, runs_on_cpu
from dlm_fast.ops._head_inputs import (
    IGNORED,
    bound_inputs,
    check_head_inputs,
    check_temperature,
    empty_rows,
    output_dtype,
    unit_stride,
)
from dlm_fast.ops._head_reference import allowed_logits_ref, entropy_ref


class TokenLogprob(NamedTuple):
    """Statistics of N rows, float32 (float64 for float64 inputs)."""

    logprob: Tensor
    """[N], natural logarithm of the target's probability"""
    lse: Tensor
    """[N], log of the sum of the exponentials of the logits"""
    entropy: Tensor
    """[N], nats"""


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
) -> TokenLogprob:
    """Differentiable in ``hidden``, ``weight`` and ``bias``.

    No [N, V] tensor is made, but for at most 80 MiB of logits that wait for the backward pass on
    the CPU (what does not fit is computed again); none wait under ``torch.no_grad()``.

    ``hidden`` [T, D] and ``weight`` [V, D] share one floating-point type. ``rows`` int32 [N] picks
    rows of ``hidden`` (they may repeat; the others are never read); None means all T. ``targets``
    int64 [N]: a row with target -100 is not read either, all its outputs are 0. ``forbid_ids`` are
    left out of the distribution.
    """
    op = "token_logprob"
    checked = check_head_inputs(op, hidden, weight, targets, rows, bias, forbid_ids)
    assert checked.targets_N is not None
    outputs = _token_logprob(
        checked.hidden_TD,
        checked.weight_VD,
        checked.targets_N,
        checked.rows_N,
        checked.bias_V,
        check_temperature(op, temperature),
        checked.forbid_ids,
        _will_differentiate(hidden, weight, bias),
    )
    return TokenLogprob(*outputs[:3])


def _will_differentiate(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def token_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
) -> TokenLogprob:
    """The definition: dense logits, differentiable. Every backend must match it."""
    kept_K = (targets != IGNORED).nonzero()[:, 0]
    rows_K = kept_K if rows is None else rows.index_select(0, kept_K)
    logits_KV = allowed_logits_ref(hidden, weight, rows_K, bias, temperature, forbid_ids)
    logprob_KV = logits_KV.log_softmax(-1)
    zeros_N = logits_KV.new_zeros(targets.shape)
    target_K1 = targets.index_select(0, kept_K)[:, None]
    values_K = (
        logprob_KV.gather(1, target_K1)[:, 0],
        torch.logsumexp(logits_KV, -1),
        entropy_ref(logprob_KV),
    )
    return TokenLogprob(*(zeros_N.index_copy(0, kept_K, value_K) for value_K in values_K))


# The op has three more outputs than its users see. Maximum and log-sum of each row: their sum is
# lse; apart they lose nothing to rounding, which the backward pass would magnify at large logits.
# And logits kept for the backward pass.
@torch.library.custom_op("dlm_fast::token_logprob", mutates_args=())
def _token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    *outputs, kept = made = _empty_outputs(hidden, weight, targets, keep_logits)
    call = cuda_call(hidden, weight, targets, rows, bias, temperature, forbid_ids)
    if call is not None:
        named = dict(zip(FORWARD, outputs, strict=True))
        if reads_head_directly(call):
            choose_tokens(call, TokenDraw(targets_N=targets, skip_ignored=True), named)
        else:
            statistics(call, named)
        return made
    extension().token_logprob_cpu(
        bound_inputs(hidden, weight, targets, rows, bias, temperature, forbid_ids),
        addresses(*outputs),
        (kept.data_ptr(), kept.nbytes),
    )
    return made


FORWARD = ("logprob", "lse", "entropy", "row_max", "log_sum")


def cuda_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
) -> HeadCall | None:
    """None where the C++ backend of the CPU is to compute."""
    executor = executor_of(hidden.device)
    if executor is None:
        return None
    return HeadCall(
        executor=executor,
        hidden_TD=hidden,
        weight_VD=weight,
        targets_N=targets,
        rows_N=rows,
        bias_V=bias,
        temperature=temperature,
        forbid_ids=forbid_ids,
    )


def _empty_outputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep_logits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e = empty_rows(hidden, targets.shape[0], 5)
    kept = a.new_empty(_kept_numbers(weight, targets, a.dtype) if keep_logits else 0)
    return a, b, c, d, e, kept


# Below it the head is read anyway for the gradient of the hidden states, and its product with a few
# rows costs next to nothing beside that.
_FEW_ROWS = 16


def _kept_numbers(weight: Tensor, targets: Tensor, dtype: torch.dtype) -> int:
    """Room for the logits of all rows, or for as many as the limit allows."""
    num_rows, vocabulary = targets.shape[0], weight.shape[0]
    if not runs_on_cpu(weight.device) or num_rows < _FEW_ROWS:
        return 0
    row_step, column_step, limit = extension().kept_logits_limits
    rows = (num_rows + row_step - 1) // row_step * row_step
    columns = (vocabulary + column_step - 1) // column_step * column_step
    return torch.sym_min(rows * columns, limit // dtype.itemsize)


@_token_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(hidden, weight, targets, keep_logits)


@torch.library.custom_op("dlm_fast::token_logprob_bwd", mutates_args=())
def _token_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    forward: list[Tensor],
    grad_logprob: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not wanted. ``forward``: all outputs."""
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    cotangents = [
        None if g is None else g.contiguous() for g in (grad_logprob, grad_lse, grad_entropy)
    ]
    *statistics_N, kept = forward
    call = cuda_call(hidden, weight, targets, rows, bias, temperature, forbid_ids)
    made = list(empty_gradients(hidden, weight, wanted))
    if wanted[0]:
        made[0] = empty_hidden_gradient(hidden, call)
    wanted_only = [g if want else None for g, want in zip(made, wanted, strict=True)]
    if call is not None:
        outputs = dict(zip(FORWARD, statistics_N, strict=True))
        results = Gradients(wanted_only[0], wanted_only[1], wanted_only[2])
        gradients(call, outputs, Cotangents(*cotangents), results, known=True)
    else:
        extension().token_logprob_bwd_cpu(
            bound_inputs(hidden, weight, targets, rows, bias, temperature, forbid_ids),
            addresses(*statistics_N),
            (kept.data_ptr(), kept.nbytes),
            addresses(*cotangents),
            addresses(*wanted_only),
        )
    # empty ones, too, have the types that the fake promises
    return made[0].to(hidden.dtype), made[1].to(weight.dtype), made[2]


def empty_hidden_gradient(hidden: Tensor, call: HeadCall | None) -> Tensor:
    """Where a gradient that is final lands: the CPU adds rows, CUDA kernels write all, rounded."""
    if call is not None:
        return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    return torch.zeros(hidden.shape, dtype=output_dtype(hidden.dtype))


def empty_gradients(
    hidden: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Where kernels leave gradients that may be scaled yet: hidden zero, for rows are added to it.

    That of a bfloat16 head is rounded by the kernel, once. float16 sums stay in float32: a scale
    that comes later, as of a loss scaler, would find small ones rounded to zero.
    """
    dtype = output_dtype(hidden.dtype)
    weight_dtype = weight.dtype if weight.dtype == torch.bfloat16 else dtype
    return (
        hidden.new_zeros(hidden.shape if wanted[0] else (0,), dtype=dtype),
        weight.new_empty(weight.shape if wanted[1] else (0,), dtype=weight_dtype),
        weight.new_empty(weight.shape[:1] if wanted[2] else (0,), dtype=dtype),
    )


@_token_logprob_bwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    forward: list[Tensor],
    grad_logprob: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    made = empty_gradients(hidden, weight, wanted)
    return made[0].to(hidden.dtype), made[1].to(weight.dtype), made[2]


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.temperature, ctx.forbid_ids = inputs[5:7]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[4]]
    if all(grad is None for grad in grads[:3]):
        return (None,) * 8
    saved = ctx.saved_tensors
    results = _token_logprob_bwd(
        *saved[:5], list(saved[5:]), *grads[:3], ctx.temperature, ctx.forbid_ids, wanted
    )
    hidden, weight, bias = (g if w else None for g, w in zip(results, wanted, strict=True))
    return hidden, weight, None, None, bias, None, None, None


_token_logprob.register_autograd(_backward, setup_context=_save_for_backward)
