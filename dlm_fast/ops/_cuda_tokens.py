"""The CUDA path of ``token_stats``: few rows straight from the head, many from chunks of logits.

Letters: ``D`` width, ``V`` vocabulary, ``N`` selected rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops._cuda_head import Chunk, HeadCall, column_index, logit_chunks
from dlm_fast.ops._executor import Emulated, Executor
from dlm_fast.ops._head_inputs import FLOAT_DTYPES

TOKEN_OUTPUTS = (
    *("token", "confidence", "lse", "entropy", "margin", "logprob"),
    *("row_max", "log_sum"),
)
"""what the kernels can write, in the order of the bindings"""

EMULATED_DEVICE = (4, 227 << 10)
"""multiprocessors and bytes of shared memory that plans count on in tests"""


@dataclass(frozen=True, kw_only=True)
class TokenDraw:
    """How a token is chosen; without keys it is the most likely one."""

    targets_N: Tensor | None = None
    """choose ``logprob`` alone"""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    keys: Tensor | None = None
    position: Tensor | None = None
    step: Tensor | None = None
    draw: int = 0
    skip_ignored: bool = False
    """rows with target -100 are not read"""

    @property
    def filtered(self) -> bool:
        return self.keys is not None and (self.top_k > 0 or self.top_p < 1)


def choose_tokens(call: HeadCall, draw: TokenDraw, outputs: dict[str, Tensor]) -> None:
    """Fills the [N] tensors of ``outputs``, named as in ``TOKEN_OUTPUTS``; float32 statistics."""
    if call.num_rows == 0:
        return
    if reads_head_directly(call) and not draw.filtered:
        _from_head(call, draw, outputs)
        return
    vocabulary = call.weight_VD.shape[0]
    # the kernel leaves forbidden columns out by itself
    for chunk, logits_NV in logit_chunks(replace(call, forbid_ids=[])):
        rows = _bound(call, draw, outputs, chunk, of_logits=True)
        place = (logits_NV.data_ptr(), logits_NV.stride(0))
        top_k = 0 if draw.top_k >= vocabulary else draw.top_k
        call.launch(extension().plan_row_draw(rows, place, top_k, draw.top_p))


def reads_head_directly(call: HeadCall) -> bool:
    """Few rows: reading the head is all the time there is, and no logits are written."""
    return call.num_rows <= extension().head_decode_max_rows and call.real == torch.float32


def _from_head(call: HeadCall, draw: TokenDraw, outputs: dict[str, Tensor]) -> None:
    hidden, weight = call.hidden_TD, call.weight_VD
    num_rows, vocabulary = call.num_rows, weight.shape[0]
    num_bytes = extension().head_decode_workspace_bytes(num_rows, vocabulary)
    partials = call.empty(num_bytes, dtype=torch.uint8)
    target_logit_N = call.empty(num_rows)
    plans = extension().plan_head_decode(
        _bound(call, draw, outputs, Chunk(0, num_rows), of_logits=False),
        FLOAT_DTYPES.index(hidden.dtype),
        (hidden.data_ptr(), hidden.stride(0), hidden.shape[0]),
        (weight.data_ptr(), weight.stride(0)),
        hidden.shape[1],
        addresses(partials, target_logit_N),
        device_facts(call.executor, call.device),
    )
    for plan in plans:
        call.launch(plan)


def _bound(
    call: HeadCall, draw: TokenDraw, outputs: dict[str, Tensor], chunk: Chunk, *, of_logits: bool
) -> object:
    """The extension's view of rows; the rows of logits are gathered already."""

    def part(values_N: Tensor | None) -> Tensor | None:
        return None if values_N is None else values_N[chunk.rows]

    forbidden = column_index(call) if call.forbid_ids else None
    rows_N = None if of_logits else call.rows_N
    return extension().TokenRows(
        (chunk.valid, call.weight_VD.shape[0]),
        call.temperature,
        addresses(call.bias_V, rows_N, part(draw.targets_N)),
        draw.skip_ignored,
        (*addresses(forbidden), 0 if forbidden is None else forbidden.shape[0]),
        addresses(part(draw.keys), part(draw.position), part(draw.step)),
        draw.draw,
        draw.temperature,
        addresses(*(part(outputs.get(name)) for name in TOKEN_OUTPUTS)),
    )


def device_facts(executor: Executor, device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may ask for."""
    if isinstance(executor, Emulated):
        return EMULATED_DEVICE
    return _cuda_facts(device)


@functools.cache
def _cuda_facts(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    # every device since sm_80 has what stands for torch versions that do not say it
    most = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return properties.multi_processor_count, most
