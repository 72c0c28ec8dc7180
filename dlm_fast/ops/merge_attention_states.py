"""Attention over parts of the keys, merged into attention over all of them.

A state is what attention over a set I of keys leaves behind, with scores s_i and values v_i:

    lse(I) = ln sum over i of exp(s_i)          out(I) = sum over i of exp(s_i - lse) v_i

    merged:  m = max lse_i    w_i = exp(lse_i - m)
             out = sum w_i out_i / sum w_i      lse = m + ln sum w_i

An empty set has lse = -inf, whatever its output holds; merged empty sets give (0, -inf), never NaN.
Logarithms are natural everywhere; some packages hand out base 2 (``lse_to_natural``).

R rows, n states of a row, S states of all rows, H heads, d head width.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, check_dtype, extension, num_threads
from dlm_fast.ops._device import check_device
from dlm_fast.ops._executor import executor_of
from dlm_fast.ops._head_inputs import FLOAT_DTYPES, output_dtype


class AttentionState(NamedTuple):
    """Attention over some keys, ready to be merged with attention over others."""

    out: Tensor
    """[R, H, d]; zeros where a row saw no key"""
    lse: Tensor
    """[R, H], natural logarithm of the sum of exponentials; -inf where a row saw no key"""


def merge_attention_states(o: Tensor, lse: Tensor, indptr: Tensor | None = None) -> AttentionState:
    """Merges n states a row, or a different number for each; differentiable, once.

    Args:
        o: [R, n, H, d], or [S, H, d] with ``indptr``; float32, 16-bit or float64.
        lse: the same without d, float32 (float64 beside float64).
        indptr: int32 [R + 1]; row r merges the states indptr[r] .. indptr[r + 1] - 1, in order.

    Returns:
        ``out`` [R, H, d] in the type of ``o``, ``lse`` [R, H] in that of ``lse``. Sums are float32
        (float64, on the CPU alone) in the order of the states: equal calls give equal bits.
    """
    _check(o, lse, indptr)
    check_device("merge_attention_states", o=o, lse=lse, indptr=indptr)
    if indptr is None:
        num_rows, num_states = o.shape[:2]
        indptr = torch.arange(num_rows + 1, dtype=torch.int32, device=o.device) * num_states
        o, lse = o.flatten(0, 1), lse.flatten(0, 1)
    return AttentionState(*_merge(o, lse, indptr))


def merge_attention_states_ref(
    o: Tensor, lse: Tensor, indptr: Tensor | None = None
) -> AttentionState:
    """The definition, row by row. Every backend must match it."""
    _check(o, lse, indptr)
    if indptr is None:
        parts = list(zip(o, lse, strict=True))
    else:
        bounds = indptr.tolist()
        parts = [(o[a:b], lse[a:b]) for a, b in itertools.pairwise(bounds)]
    merged = [_merge_row(o_nHd.to(lse.dtype), lse_nH) for o_nHd, lse_nH in parts]
    if not merged:
        return AttentionState(o.new_zeros(0, *o.shape[-2:]), lse.new_zeros(0, lse.shape[-1]))
    outs, lses = zip(*merged, strict=True)
    return AttentionState(torch.stack(outs).to(o.dtype), torch.stack(lses))


def _merge_row(o_nHd: Tensor, lse_nH: Tensor) -> tuple[Tensor, Tensor]:
    is_empty_nH = lse_nH == -torch.inf
    o_nHd = o_nHd.masked_fill(is_empty_nH[..., None], 0)
    # ln of a sum over nothing is -inf; its gradient would be NaN
    is_empty_H = is_empty_nH.all(0)
    lse_H = lse_nH.masked_fill(is_empty_H, 0).logsumexp(0) if len(lse_nH) else lse_nH.sum(0)
    weight_nH = (lse_nH - lse_H).exp().masked_fill(is_empty_nH, 0)
    out_Hd = (weight_nH[..., None] * o_nHd).sum(0)
    return out_Hd, lse_H.masked_fill(is_empty_H, -torch.inf)


def lse_to_natural(lse: Tensor, lse_base: float = 2.0) -> Tensor:
    """A log-sum-exp of another package in natural logarithms. FlashInfer hands out base 2 on most
    of its ways, FlashAttention base e; a mix-up is an error of the size of the outputs."""
    return lse * math.log(_checked_base(lse_base))


def lse_from_natural(lse: Tensor, lse_base: float = 2.0) -> Tensor:
    """Our natural log-sum-exp in the base that another package expects."""
    return lse / math.log(_checked_base(lse_base))


def _checked_base(lse_base: float) -> float:
    if not (math.isfinite(lse_base) and lse_base > 1):
        raise ValueError(f"lse_base must be a number above 1, such as 2 or math.e, got {lse_base}")
    return lse_base


@torch.library.custom_op(
    "dlm_fast::merge_attention_states", mutates_args=(), device_types=("cpu", "cuda")
)
def _merge(o: Tensor, lse: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    o, lse, indptr = o.contiguous(), lse.contiguous(), indptr.contiguous()
    num_rows, (num_states, heads, width) = indptr.shape[0] - 1, o.shape
    merged = lse.new_empty(num_rows, heads)
    executor, dtype = executor_of(o.device), FLOAT_DTYPES.index(o.dtype)
    if executor is None:
        out = torch.empty(num_rows, heads, width, dtype=lse.dtype)
        extension().attention_merge_cpu(
            (num_rows, num_states, heads, width),
            dtype,
            addresses(o, lse, indptr),
            addresses(out, merged),
            num_threads(),
        )
        return out.to(o.dtype), merged
    out = o.new_empty(num_rows, heads, width)
    if num_rows:
        states = o.float()
        plan = extension().plan_attention_merge(
            (num_rows, heads, width),
            dtype,
            addresses(states, lse, indptr),
            addresses(out, merged),
        )
        executor.launch(plan, o.device)
    return out, merged


@_merge.register_fake
def _(o: Tensor, lse: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    num_rows = indptr.shape[0] - 1
    return o.new_empty(num_rows, *o.shape[1:]), lse.new_empty(num_rows, lse.shape[1])


@torch.library.custom_op(
    "dlm_fast::merge_attention_states_bwd", mutates_args=(), device_types=("cpu", "cuda")
)
def _merge_bwd(
    o: Tensor,
    lse: Tensor,
    indptr: Tensor,
    out: Tensor,
    merged_lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """grad_o_i = w_i grad_out and grad_lse_i = w_i (grad_out . (o_i - out) + grad_lse), with
    w_i = exp(lse_i - lse)."""
    counts = indptr.diff().to(torch.int64)
    row_S = torch.arange(len(counts), device=o.device).repeat_interleave(counts)
    first = int(indptr[0])
    states = slice(first, first + len(row_S))
    is_empty_SH = lse[states] == -torch.inf
    weight_SH = (lse[states] - merged_lse[row_S]).exp().masked_fill(is_empty_SH, 0)
    grad_o, grad_state_lse = torch.zeros_like(o), torch.zeros_like(lse)
    inner_SH = torch.zeros_like(weight_SH)
    if grad_out is not None:
        upstream_SHd = grad_out[row_S].to(lse.dtype)
        grad_o[states] = (weight_SH[..., None] * upstream_SHd).to(o.dtype)
        inner_SH = (upstream_SHd * (o[states].to(lse.dtype) - out[row_S])).sum(-1)
    if grad_lse is not None:
        inner_SH = inner_SH + grad_lse[row_S]
    # the output of an empty state may hold anything, and NaN outlives a product with zero
    grad_state_lse[states] = (weight_SH * inner_SH).masked_fill(is_empty_SH, 0)
    return grad_o, grad_state_lse


@_merge_bwd.register_fake
def _(
    o: Tensor,
    lse: Tensor,
    indptr: Tensor,
    out: Tensor,
    merged_lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(o), torch.empty_like(lse)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_out is None and grad_lse is None:
        return None, None, None
    return *_merge_bwd(*ctx.saved_tensors, grad_out, grad_lse), None


_merge.register_autograd(_backward, setup_context=_save_for_backward)


def _check(o: Tensor, lse: Tensor, indptr: Tensor | None) -> None:
    op = "merge_attention_states"
    check_dtype(op, "o", o, *FLOAT_DTYPES)
    check_dtype(op, "lse", lse, output_dtype(o.dtype))
    form = "[rows, states, heads, width]" if indptr is None else "[states, heads, width]"
    if o.dim() != (4 if indptr is None else 3) or o.shape[-1] == 0 or o.shape[-2] == 0:
        raise ValueError(
            f"{op}: o must be {form} {'without' if indptr is None else 'with'} indptr, with a head "
            f"and a width at least, got {list(o.shape)}"
        )
    if lse.shape != o.shape[:-1]:
        raise ValueError(
            f"{op}: lse must be {list(o.shape[:-1])}, as o without its width, got {list(lse.shape)}"
        )
    if indptr is not None:
        check_dtype(op, "indptr", indptr, torch.int32)
        if indptr.dim() != 1 or len(indptr) == 0:
            raise ValueError(f"{op}: indptr must be [rows + 1], got {list(indptr.shape)}")
