"""The CUDA path of the head ops: matrix products by torch, our kernels between them.

Rows are taken in chunks of one padded shape: gather rows, multiply them with the head (float32
logits), one kernel over each row of logits; where gradients are wanted it leaves those of the
logits in the type of the inputs, and two products over a group of chunks follow. Nothing waits for
the device.

Letters: ``T`` rows of hidden states, ``D`` width, ``V`` vocabulary, ``N`` selected rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops._executor import Executor, has_clusters
from dlm_fast.ops._gemm import HALVES, add_weight_gradient, head_logits, hidden_gradient
from dlm_fast.ops._head_inputs import FLOAT_DTYPES, output_dtype

LOGITS_BYTES = 128 << 20
"""of a chunk of logits: what a call needs beyond its outputs, if it wants no gradient"""
LOGITS_GRAD_BYTES = 512 << 20
"""of a group's gradients of the logits, in 16 bits"""
MAX_GROUP = 2048
"""rows of one product of the head's gradient: enough to hide reading and writing that gradient"""
ROW_ALIGNMENT = 64
"""chunks are multiples of it, as the tiles of matrix products are"""
COLUMN_ALIGNMENT = 8
"""elements between rows are a multiple of it, so that rows begin at 16-byte boundaries"""

STATISTICS = (
    *("logprob", "lse", "entropy", "row_max", "log_sum", "confidence", "margin"),
    "argmax",
)
"""what the row kernels can write, in the order of the bindings"""


@dataclass(frozen=True, kw_only=True)
class HeadCall:
    """Checked inputs of one call."""

    executor: Executor
    hidden_TD: Tensor
    weight_VD: Tensor
    targets_N: Tensor | None
    rows_N: Tensor | None
    bias_V: Tensor | None = None
    temperature: float = 1.0
    forbid_ids: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return (self.hidden_TD if self.rows_N is None else self.rows_N).shape[0]

    @property
    def real(self) -> torch.dtype:
        return output_dtype(self.hidden_TD.dtype)

    @property
    def stored(self) -> torch.dtype:
        """of the gradients of logits: that of the factors they are multiplied with"""
        return self.hidden_TD.dtype

    @property
    def in_place(self) -> bool:
        """gradients of logits take the place of the logits"""
        return self.stored == self.real

    @property
    def device(self) -> torch.device:
        return self.hidden_TD.device

    def launch(self, plan: tuple) -> None:
        self.executor.launch(plan, self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.real, device=self.device)

    def padded_rows(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V] with rows that begin at 16-byte boundaries."""
        vocabulary = self.weight_VD.shape[0]
        return self.empty(rows, _round_up(vocabulary, COLUMN_ALIGNMENT), dtype=dtype)[
            :, :vocabulary
        ]


@dataclass(frozen=True)
class Chunk:
    """Selected rows ``first`` to ``first + valid``; kernels and products see a padded number."""

    first: int
    valid: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.valid)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def chunk_rows(num_rows: int, most: int) -> int:
    """Rows of every chunk: the fewest chunks of at most ``most`` rows, all of one shape."""
    most = max(ROW_ALIGNMENT, most // ROW_ALIGNMENT * ROW_ALIGNMENT)
    chunks = -(-num_rows // most)
    return _round_up(-(-num_rows // chunks), ROW_ALIGNMENT)


def _chunks(first: int, num_rows: int, each: int) -> Iterator[Chunk]:
    for start in range(first, first + num_rows, each):
        yield Chunk(start, min(each, first + num_rows - start))


def _logit_rows_at_once(call: HeadCall) -> int:
    return LOGITS_BYTES // (call.weight_VD.shape[0] * call.real.itemsize)


def gather_rows(call: HeadCall, chunk: Chunk, out_ND: Tensor) -> None:
    """Selected rows of hidden states, contiguous; zeros for ignored and for missing rows."""
    rows_N = None if call.rows_N is None else call.rows_N[chunk.rows]
    targets_N = None if call.targets_N is None else call.targets_N[chunk.rows]
    hidden = call.hidden_TD
    call.launch(
        extension().plan_gather_rows(
            (out_ND.shape[0], chunk.valid, *hidden.shape),
            (hidden.data_ptr(), hidden.stride(0)),
            *addresses(rows_N),
            chunk.first,
            *addresses(targets_N, out_ND),
            FLOAT_DTYPES.index(hidden.dtype),
        )
    )


def chunk_logits(call: HeadCall, hidden_ND: Tensor, logits_NV: Tensor) -> None:
    """Before bias and temperature; minus infinity in forbidden columns."""
    head_logits(hidden_ND, call.weight_VD, logits_NV)
    if call.forbid_ids:
        logits_NV.index_fill_(1, column_index(call), float("-inf"))


def column_index(call: HeadCall) -> Tensor:
    """The forbidden ids on the device."""
    key = (tuple(call.forbid_ids), call.device)
    if key not in _column_indices:
        if len(_column_indices) >= 64:
            _column_indices.clear()
        _column_indices[key] = torch.tensor(call.forbid_ids, device=call.device)
    return _column_indices[key]


# Copying the ids in every call would keep it out of CUDA graphs.
_column_indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def bound_rows(
    call: HeadCall, chunk: Chunk, logits_NV: Tensor, outputs: dict[str, Tensor]
) -> object:
    """The extension's view of a chunk of logits; ``outputs`` are [N] of the whole call."""
    targets_N = None if call.targets_N is None else call.targets_N[chunk.rows]
    places = [outputs[n][chunk.rows] if n in outputs else None for n in STATISTICS]
    return extension().LogitRows(
        (chunk.valid, logits_NV.shape[1]),
        (logits_NV.data_ptr(), logits_NV.stride(0)),
        FLOAT_DTYPES.index(logits_NV.dtype),
        *addresses(call.bias_V),
        call.temperature,
        *addresses(targets_N),
        addresses(*places),
    )


def one_read(call: HeadCall) -> bool:
    """Whether clusters of blocks can hold a row, so that it is read once."""
    if call.real != torch.float32 or not extension().cluster_fits(call.weight_VD.shape[0]):
        return False
    return has_clusters(call.executor, call.device)


def statistics(call: HeadCall, outputs: dict[str, Tensor]) -> None:
    """Fills the [N] tensors of ``outputs``, named as in ``STATISTICS``."""
    if call.num_rows == 0:
        return
    top = not outputs.keys().isdisjoint({"confidence", "margin", "argmax"})
    for chunk, logits_NV in logit_chunks(call):
        rows = bound_rows(call, chunk, logits_NV, outputs)
        call.launch(extension().plan_row_stats(rows, top, one_read(call)))


def logit_chunks(call: HeadCall) -> Iterator[tuple[Chunk, Tensor]]:
    """Logits of all selected rows, chunk by chunk, in one buffer."""
    each = chunk_rows(call.num_rows, _logit_rows_at_once(call))
    logits_NV = call.padded_rows(each, call.real)
    hidden_ND = call.empty(each, call.hidden_TD.shape[1], dtype=call.hidden_TD.dtype)
    for chunk in _chunks(0, call.num_rows, each):
        gather_rows(call, chunk, hidden_ND)
        chunk_logits(call, hidden_ND, logits_NV)
        yield chunk, logits_NV


@dataclass(frozen=True)
class Cotangents:
    """Of the three differentiable statistics, [N] or None: zero."""

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Where gradients go; None: not wanted."""

    hidden_TD: Tensor | None
    """in any floating-point type; overwritten"""
    weight_VD: Tensor | None
    bias_V: Tensor | None
    accumulate: bool = False
    """add to those of head and bias; otherwise overwrite them"""
    alpha: float = 1.0
    """factor of those of head and bias"""


def gradients(
    call: HeadCall,
    outputs: dict[str, Tensor],
    cotangents: Cotangents,
    results: Gradients,
    *,
    known: bool,
) -> None:
    """``known``: the statistics in ``outputs`` come from an earlier pass; otherwise fills them."""
    if call.num_rows == 0:
        _clear(results)
        return
    vocabulary = call.weight_VD.shape[0]
    each = chunk_rows(call.num_rows, _logit_rows_at_once(call))
    most = min(MAX_GROUP, LOGITS_GRAD_BYTES // (vocabulary * call.stored.itemsize))
    # a group is a whole number of chunks
    group = each if call.in_place else max(each, most // each * each)
    group = min(group, _round_up(call.num_rows, each))
    workspace = _Workspace(
        hidden_ND=call.empty(group, call.hidden_TD.shape[1], dtype=call.hidden_TD.dtype),
        logits_NV=call.padded_rows(each, call.real),
        logits_grad_NV=None if call.in_place else call.padded_rows(group, call.stored),
    )
    selected_grad_ND = call.empty(_round_up(call.num_rows, group), call.hidden_TD.shape[1])
    sums_VD = _weight_sums(results, whole=group >= call.num_rows)
    for members in _chunks(0, call.num_rows, group):
        for chunk in _chunks(members.first, members.valid, each):
            _fill_logits_grad(call, chunk, members, workspace, outputs, cotangents, known)
        padded = _round_up(members.valid, each)
        grad_NV = workspace.grad[:padded]
        if results.hidden_TD is not None:
            hidden_gradient(
                grad_NV, call.weight_VD, selected_grad_ND[members.first : members.first + padded]
            )
        keep = results.accumulate or members.first > 0
        if sums_VD is not None:
            hidden_ND = workspace.hidden_ND[:padded]
            add_weight_gradient(sums_VD, grad_NV, hidden_ND, results.alpha, keep=keep)
        if results.bias_V is not None:
            _add_bias_gradient(results.bias_V, grad_NV, results.alpha, keep=keep)
    if sums_VD is not None and sums_VD is not results.weight_VD:
        assert results.weight_VD is not None
        results.weight_VD.copy_(sums_VD)
    if results.hidden_TD is not None:
        scatter_rows(call, selected_grad_ND[: call.num_rows], results.hidden_TD)


@dataclass(frozen=True, kw_only=True)
class _Workspace:
    hidden_ND: Tensor
    """of a group"""
    logits_NV: Tensor
    """of a chunk"""
    logits_grad_NV: Tensor | None
    """of a group; None: in the place of the logits, and the group is the chunk"""

    @property
    def grad(self) -> Tensor:
        return self.logits_NV if self.logits_grad_NV is None else self.logits_grad_NV


def _weight_sums(results: Gradients, *, whole: bool) -> Tensor | None:
    """Where products add: the result, or float32 sums where several would be rounded each."""
    weight = results.weight_VD
    if weight is None or whole or weight.dtype not in HALVES:
        return weight
    return torch.empty_like(weight, dtype=torch.float32)


def _fill_logits_grad(
    call: HeadCall,
    chunk: Chunk,
    members: Chunk,
    workspace: _Workspace,
    outputs: dict[str, Tensor],
    cotangents: Cotangents,
    known: bool,
) -> None:
    """Gradients of one chunk's logits, at its place in the group's buffers."""
    each = workspace.logits_NV.shape[0]
    start = chunk.first - members.first
    hidden_ND = workspace.hidden_ND[start : start + each]
    gather_rows(call, chunk, hidden_ND)
    chunk_logits(call, hidden_ND, workspace.logits_NV)
    grad_NV = workspace.grad if call.in_place else workspace.grad[start : start + each]
    grad_NV[chunk.valid :].zero_()  # rows that only fill the shape
    given = (cotangents.logprob, cotangents.lse, cotangents.entropy)
    rows = extension().LogitRowsGrad(
        bound_rows(call, chunk, workspace.logits_NV, outputs),
        addresses(*(None if g is None else g[chunk.rows] for g in given)),
        (grad_NV.data_ptr(), grad_NV.stride(0), FLOAT_DTYPES.index(grad_NV.dtype)),
        (hidden_ND.data_ptr(), hidden_ND.shape[1]),
    )
    if known:
        call.launch(extension().plan_row_grad(rows))
    else:
        call.launch(extension().plan_row_step(rows, one_read(call)))


def _add_bias_gradient(
    bias_grad_V: Tensor, logits_grad_NV: Tensor, alpha: float, *, keep: bool
) -> None:
    sum_V = logits_grad_NV.sum(0, dtype=bias_grad_V.dtype)
    if keep:
        bias_grad_V.add_(sum_V, alpha=alpha)
    else:
        torch.mul(sum_V, alpha, out=bias_grad_V)


def _clear(results: Gradients) -> None:
    if results.hidden_TD is not None:
        results.hidden_TD.zero_()
    for gradient in (results.weight_VD, results.bias_V):
        if gradient is not None and not results.accumulate:
            gradient.zero_()


def scatter_rows(call: HeadCall, grad_ND: Tensor, out_TD: Tensor) -> None:
    """Gradients of selected rows back to all rows: zero elsewhere, repeated rows in their order."""
    if call.rows_N is None:
        out_TD.copy_(grad_ND)
        return
    num_hidden, width = out_TD.shape
    if num_hidden == 0:
        return
    sorted_N, order_N = call.rows_N.sort(stable=True)
    every_row = torch.arange(num_hidden + 1, dtype=sorted_N.dtype, device=call.device)
    start = torch.searchsorted(sorted_N, every_row)
    call.launch(
        extension().plan_scatter_rows(
            num_hidden,
            width,
            *addresses(grad_ND, order_N, start, out_TD),
            FLOAT_DTYPES.index(out_TD.dtype),
        )
    )
