"""Attention under a visibility: each key is seen by two half-open intervals of query rows.

    out[i] = sum over visible j of softmax(scale * q[i] . k[j]) v[j]      0 where i sees no key
    lse[i] = ln sum over visible j of exp(scale * q[i] . k[j])

Tq query rows, Tk key rows, H query heads, G key heads (H is a multiple of G: neighbouring query
heads share one), d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, check_dtype, extension, num_threads
from dlm_fast.ops._flex_attention import flex_interval_attention
from dlm_fast.ops._head_inputs import FLOAT_DTYPES, output_dtype
from dlm_fast.ops.visibility import Visibility, dense_mask


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility | Tensor,
    scale: float | None = None,
) -> Tensor:
    """[Tq, H, d] in the type of the inputs; differentiable, once, in ``q``, ``k`` and ``v``.

    ``q`` [Tq, H, d], ``k`` and ``v`` [Tk, G, d] share one floating-point type; rows and heads may
    be strided. ``visibility`` may also be its ``intervals``, int32 [Tk, 4]. ``scale`` defaults to
    d ** -0.5. No [Tq, Tk] array is made; key tiles that nobody in a query tile sees cost nothing. A
    row that sees no key gives zeros. NaN in a row reaches those that see it and nobody else.

    On CUDA this is FlexAttention, compiled at first use. On the CPU
    ``torch.ops.dlm_fast.interval_attention`` also gives lse [Tq, H].
    """
    intervals = _intervals_of(visibility)
    _check(q, k, v, intervals)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if q.is_cuda:
        return flex_interval_attention(q, k, v, intervals, scale)
    out, _ = _interval_attention(q, k, v, intervals, scale)
    return out


def interval_attention_ref(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    visibility: Visibility | Tensor,
    scale: float | None = None,
) -> Tensor:
    """The definition, dense: [Tq, H, d]. Every backend must match it."""
    intervals = _intervals_of(visibility)
    _check(q_THd, k_TGd, v_TGd, intervals.to(q_THd.device))
    mask = dense_mask(intervals.to(q_THd.device), q_THd.shape[0])
    group = q_THd.shape[1] // k_TGd.shape[1]
    k_THd, v_THd = (x.repeat_interleave(group, dim=1) for x in (k_TGd, v_TGd))
    scale = q_THd.shape[-1] ** -0.5 if scale is None else scale
    score_HTT = torch.einsum("qhd,khd->hqk", q_THd, k_THd) * scale
    score_HTT = score_HTT.masked_fill(~mask, torch.finfo(score_HTT.dtype).min)
    # the product with the mask makes zeros of the uniform weights of a row that sees nothing
    weight_HTT = score_HTT.softmax(-1) * mask
    return torch.einsum("hqk,khd->qhd", weight_HTT, v_THd)


@torch.library.custom_op("dlm_fast::interval_attention", mutates_args=(), device_types="cpu")
def _interval_attention(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_rows(q), _unit_rows(k), _unit_rows(v)
    intervals = intervals.contiguous()
    dtype = output_dtype(q.dtype)
    out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:2], dtype=dtype)
    inputs = _bound_inputs(q, k, v, intervals, scale)
    extension().interval_attention_cpu(inputs, *addresses(out, lse))
    return out.to(q.dtype), lse


@_interval_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=output_dtype(q.dtype))


@torch.library.custom_op("dlm_fast::interval_attention_bwd", mutates_args=(), device_types="cpu")
def _interval_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, grad_out = (_unit_rows(x) for x in (q, k, v, out, grad_out))
    intervals = intervals.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dtype = output_dtype(q.dtype)
    gradients = [x.new_empty(x.shape, dtype=dtype) for x in (q, k, v)]
    extension().interval_attention_bwd_cpu(
        _bound_inputs(q, k, v, intervals, scale),
        (_bound_rows(out), _bound_rows(grad_out)),
        addresses(lse, grad_lse),
        addresses(*gradients),
    )
    grad_q, grad_k, grad_v = (gradient.to(q.dtype) for gradient in gradients)
    return grad_q, grad_k, grad_v


@_interval_attention_bwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.scale = inputs[4]


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 5
    q, k, v, intervals, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = _interval_attention_bwd(q, k, v, intervals, ctx.scale, out, lse, grad_out, grad_lse)
    return *gradients, None, None


def _refuse_second(_ctx: Any, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "interval_attention: second derivatives are not implemented; "
        "use interval_attention_ref where they are needed"
    )


_interval_attention.register_autograd(_backward, setup_context=_save_for_backward)
_interval_attention_bwd.register_autograd(_refuse_second)


def _unit_rows(x_THd: Tensor) -> Tensor:
    """The tensor with the numbers of a row next to each other."""
    return x_THd if x_THd.stride(2) == 1 else x_THd.contiguous()


def _bound_rows(x_THd: Tensor) -> tuple[int, int, int]:
    return x_THd.data_ptr(), x_THd.stride(0), x_THd.stride(1)


def _bound_inputs(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, scale: float) -> Any:
    """The extension's view of the inputs; they must outlive it."""
    return extension().IntervalAttentionInputs(
        (q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2]),
        FLOAT_DTYPES.index(q.dtype),
        (_bound_rows(q), _bound_rows(k), _bound_rows(v)),
        *addresses(intervals),
        scale,
        num_threads(),
    )


def _intervals_of(visibility: Visibility | Tensor) -> Tensor:
    return visibility.intervals if isinstance(visibility, Visibility) else visibility


def _check(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, intervals_T4: Tensor) -> None:
    op = "interval_attention"
    check_dtype(op, "q", q_THd, *FLOAT_DTYPES)
    check_dtype(op, "visibility", intervals_T4, torch.int32)
    for name, x in (("q", q_THd), ("k", k_TGd), ("v", v_TGd)):
        check_dtype(op, name, x, q_THd.dtype)
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(
                f"{op}: {name} must be [rows, heads, width] with a head and a width at least, got "
                f"{list(x.shape)}"
            )
    for name, x in (("k", k_TGd), ("v", v_TGd), ("visibility", intervals_T4)):
        if x.device != q_THd.device:
            raise ValueError(
                f"{op}: {name} lies on {x.device} but q on {q_THd.device}; move them to one device"
            )
    if intervals_T4.dim() != 2 or intervals_T4.shape[1] != 4:
        raise ValueError(
            f"{op}: visibility must have intervals [keys, 4], got {list(intervals_T4.shape)}"
        )
    if k_TGd.shape != v_TGd.shape or k_TGd.shape[0] != intervals_T4.shape[0]:
        raise ValueError(
            f"{op}: k {list(k_TGd.shape)} and v {list(v_TGd.shape)} must have one shape and the "
            f"{intervals_T4.shape[0]} rows of the visibility"
        )
    if q_THd.shape[1] % k_TGd.shape[1]:
        raise ValueError(
            f"{op}: the {q_THd.shape[1]} query heads of q are not a multiple of the "
            f"{k_TGd.shape[1]} key heads of k"
        )
    if q_THd.shape[2] != k_TGd.shape[2]:
        raise ValueError(
            f"{op}: q has heads of width {q_THd.shape[2]}, but k and v of {k_TGd.shape[2]}"
        )
