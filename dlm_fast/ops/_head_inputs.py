"""The checks that the language-model-head ops share: shapes, types, ranges, before any launch.

Letters: ``T`` rows of hidden states, ``D`` width, ``V`` vocabulary, ``N`` selected rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from dlm_fast.ops._common import addresses, extension, num_threads
from dlm_fast.ops._device import check_device

IGNORED = -100
"""target of a row that takes no part, as in ``torch.nn.functional.cross_entropy``"""

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""in the order of the C++ side's numbers"""


@dataclass(frozen=True)
class HeadInputs:
    """Arguments of a head op in the one form that the kernels and the twins take."""

    hidden_TD: Tensor
    weight_VD: Tensor
    targets_N: Tensor | None
    rows_N: Tensor | None
    bias_V: Tensor | None
    forbid_ids: list[int]


def check_head_inputs(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    forbid_ids: Sequence[int],
) -> HeadInputs:
    """Raises ``TypeError`` or ``ValueError`` that names the argument; converts index types."""
    _check_matrices(op, hidden, weight, bias)
    check_device(op, hidden=hidden, weight=weight, targets=targets, rows=rows, bias=bias)
    forbidden = _check_forbidden(op, forbid_ids, weight.shape[0])
    rows_N = None if rows is None else _check_rows(op, rows, hidden.shape[0])
    num_rows = hidden.shape[0] if rows_N is None else rows_N.shape[0]
    targets_N = None
    if targets is not None:
        targets_N = _check_targets(op, targets, num_rows, rows is None, weight.shape[0], forbidden)
    bias_V = None if bias is None else bias.to(output_dtype(hidden.dtype)).contiguous()
    return HeadInputs(
        unit_stride(hidden),
        unit_stride(weight),
        targets_N,
        rows_N,
        bias_V,
        forbidden,
    )


def output_dtype(inputs: torch.dtype) -> torch.dtype:
    """float32 for 32 and 16 bit inputs, float64 for float64."""
    return torch.float64 if inputs == torch.float64 else torch.float32


def unit_stride(matrix: Tensor) -> Tensor:
    """The matrix with neighbouring columns next to each other; rows may keep any stride."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def indices(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of the type; asking first costs a tenth of a conversion that does nothing."""
    if numbers.dtype == dtype and numbers.is_contiguous():
        return numbers
    return numbers.to(dtype).contiguous()


def empty_rows(like: Tensor, num_rows: int, count: int) -> tuple[Tensor, ...]:
    """Several [N] tensors in the type of the outputs, on the device of ``like``."""
    first = torch.empty(num_rows, dtype=output_dtype(like.dtype), device=like.device)
    return first, *(torch.empty_like(first) for _ in range(count - 1))


def bound_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    forbid_ids: list[int],
) -> Any:
    """The extension's view of checked inputs; it keeps no tensor alive."""
    return extension().HeadInputs(
        (
            (hidden if rows is None else rows).shape[0],
            *hidden.shape,
            weight.shape[0],
        ),
        FLOAT_DTYPES.index(hidden.dtype),
        (hidden.stride(0), weight.stride(0)),
        addresses(hidden, weight, targets, rows, bias),
        temperature,
        forbid_ids,
        num_threads(),
    )


def check_temperature(op: str, temperature: float) -> float:
    """A finite number above zero."""
    if not (isinstance(temperature, int | float) and math.isfinite(temperature)):
        raise ValueError(f"{op}: temperature must be a finite number, got {temperature!r}")
    if temperature <= 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    return float(temperature)


def check_row_weight(op: str, row_weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """One constant per target, in the type of the outputs."""
    if not isinstance(row_weight, Tensor) or not row_weight.is_floating_point():
        raise TypeError(
            f"{op}: row_weight must be a floating-point tensor, got {_kind(row_weight)}"
        )
    if row_weight.shape != targets.shape:
        raise ValueError(
            f"{op}: row_weight must have one entry per target, shape {tuple(targets.shape)}, "
            f"got {tuple(row_weight.shape)}"
        )
    if row_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: row_weight is a constant of this op but requires grad; detach it, or use "
            "token_logprob and multiply outside"
        )
    check_device(op, row_weight=row_weight, targets=targets)
    return row_weight.detach().to(dtype).contiguous()


def check_gradient(
    op: str, name: str, gradient: Tensor, of_name: str, of: Tensor, dtype: torch.dtype
) -> None:
    """A buffer that kernels add to."""
    if not isinstance(gradient, Tensor) or gradient.dtype != dtype:
        raise TypeError(f"{op}: {name} must be a {dtype} tensor, got {_kind(gradient)}")
    if gradient.shape != of.shape or not gradient.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous and have the shape {tuple(of.shape)} of {of_name}, "
            f"got shape {tuple(gradient.shape)} with strides {gradient.stride()}"
        )
    if gradient.requires_grad:
        raise ValueError(f"{op}: {name} is written in place and must not require grad")
    check_device(op, **{name: gradient})


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_matrices(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, matrix, shape in (("hidden", hidden, "[T, D]"), ("weight", weight, "[V, D]")):
        if not isinstance(matrix, Tensor) or matrix.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{op}: {name} must be a float32, bfloat16, float16 or float64 tensor, "
                f"got {_kind(matrix)}"
            )
        if matrix.dim() != 2:
            raise ValueError(
                f"{op}: {name} must have shape {shape}, got {tuple(matrix.shape)}; "
                "flatten leading dimensions first"
            )
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{op}: hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them "
            "(weight.to(hidden.dtype) keeps the gradient in the weight's own type)"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden has width {hidden.shape[1]} but weight has width {weight.shape[1]}; "
            "hidden is [T, D] and weight [V, D]"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"{op}: weight must have at least one row and column, got {tuple(weight.shape)}"
        )
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dtype not in (weight.dtype, torch.float32):
        raise TypeError(
            f"{op}: bias must have the dtype of weight ({weight.dtype}) or float32, "
            f"got {_kind(bias)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: bias must have shape ({weight.shape[0]},), one entry per vocabulary row, "
            f"got {tuple(bias.shape)}"
        )


def _check_forbidden(op: str, forbid_ids: Sequence[int], vocabulary: int) -> list[int]:
    if isinstance(forbid_ids, Tensor):
        raise TypeError(f"{op}: forbid_ids must be a list of ints, got a tensor; use .tolist()")
    ids = sorted({int(token) for token in forbid_ids})
    if ids and (ids[0] < 0 or ids[-1] >= vocabulary):
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise ValueError(f"{op}: forbid_ids holds {wrong}, outside the vocabulary of {vocabulary}")
    if len(ids) == vocabulary:
        raise ValueError(f"{op}: forbid_ids forbids all {vocabulary} tokens; leave at least one")
    return ids


def _can_look_at(numbers: Tensor) -> bool:
    """On a device, looking would wait for it: there a number out of range gives NaN instead."""
    return numbers.is_cpu and not torch.compiler.is_compiling() and not is_fake(numbers)


def _check_rows(op: str, rows: Tensor, num_hidden: int) -> Tensor:
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: rows must be an int32 or int64 tensor of row numbers, got {_kind(rows)}; "
            "for a mask use mask.nonzero()[:, 0]"
        )
    if rows.dim() != 1:
        raise ValueError(f"{op}: rows must have shape [N], got {tuple(rows.shape)}")
    if rows.numel() and _can_look_at(rows):
        low, high = map(int, rows.aminmax())
        if low < 0 or high >= num_hidden:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{op}: rows holds {wrong}, but hidden has rows 0 to {num_hidden - 1} only"
            )
    return indices(rows, torch.int32)


def _check_targets(
    op: str, targets: Tensor, num_rows: int, all_rows: bool, vocabulary: int, forbidden: list[int]
) -> Tensor:
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: targets must be an int64 tensor, got {_kind(targets)}")
    if targets.shape != (num_rows,):
        per = "row of hidden (rows is None)" if all_rows else "entry of rows"
        raise ValueError(
            f"{op}: targets must hold one token id per {per}, shape ({num_rows},), "
            f"got {tuple(targets.shape)}"
        )
    if num_rows and _can_look_at(targets):
        low, high = map(int, targets.aminmax())
        if low < 0 or high >= vocabulary:
            _check_target_range(op, targets, vocabulary)
        if forbidden and low <= forbidden[-1]:
            _check_target_allowed(op, targets, forbidden)
    return indices(targets, torch.int64)


def _check_target_range(op: str, targets: Tensor, vocabulary: int) -> None:
    wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= vocabulary)
    if wrong.any():
        index = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{op}: targets[{index}] is {int(targets[index])}, outside the vocabulary of "
            f"{vocabulary} ({IGNORED} marks a row to leave out)"
        )


def _check_target_allowed(op: str, targets: Tensor, forbidden: list[int]) -> None:
    wrong = torch.isin(targets, torch.tensor(forbidden, dtype=targets.dtype))
    if wrong.any():
        index = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{op}: targets[{index}] is {int(targets[index])}, which forbid_ids forbids: its "
            "log-probability would be minus infinity"
        )
