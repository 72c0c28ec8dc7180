"""Attention of queries over the paths of a prefix tree, each token of the tree read once.

A query row belongs to a node of a ``TreeKVPool`` and sees the tokens of its path:

    out[i] = sum over j in path(i) of softmax(scale * q[i] . k[j]) v[j]
    lse[i] = ln sum over j in path(i) of exp(scale * q[i] . k[j])

Paths share their beginnings. A plan puts rows in depth-first order, so that the rows that see a
node are one range; keys of a run of nodes meet all their rows at once and leave a partial state per
row; the states of a row are merged by log-sum-exp. Paged decoding without sharing is the case of
one run a row. Sources: cascade inference of FlashInfer (Ye et al.), Hydragen (arXiv 2402.05099),
DeFT (arXiv 2404.00242).

T query rows, H query heads, G key heads (H is a multiple of G), d head width, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, check_dtype, extension, num_threads
from dlm_fast.ops._cuda_tokens import device_facts
from dlm_fast.ops._device import check_device
from dlm_fast.ops._executor import executor_of
from dlm_fast.ops._head_inputs import FLOAT_DTYPES, output_dtype
from dlm_fast.ops.merge_attention_states import AttentionState
from dlm_fast.ops.tree_kv_pool import TreeKVPool

ABSORB = ("by_cost", "never", "always")
"""a way's place is its number in C++"""

CPU_LINES = 128
"""rows times query heads of a key head that one item takes"""

CUDA_LINES = 32
"""the same; a warp takes four, a block eight warps"""


@dataclass(frozen=True, kw_only=True, eq=False)
class TreePlan:
    """Which rows meet which keys: made once for all layers, until a token or a node is added."""

    packed: Tensor
    """int32, on the pool's device; csrc/include/dlm_fast/tree_plan.h has its parts"""
    sizes: tuple[int, ...]
    """items, pieces, rows, destinations, merges and slots in it"""
    nodes: tuple[int, ...]
    """handles of the nodes that rows belong to"""
    row_counts: tuple[int, ...]
    """rows of each"""
    causal: bool
    """the rows of a node are its path's last tokens, and each sees up to itself"""
    query_heads: int
    """H that the plan was made for"""
    row_tile: int
    """most rows of an item"""
    unique_tokens: int
    """tokens of all nodes on the paths"""
    read_tokens: int
    """keys that are read: ``unique_tokens``, and again those that a plan reads for each child"""
    version: int
    """of the pool when the plan was made"""

    @property
    def num_rows(self) -> int:
        return sum(self.row_counts)


def plan_tree_attention(
    pool: TreeKVPool,
    nodes: Sequence[int],
    row_counts: Sequence[int] | int = 1,
    *,
    query_heads: int,
    causal: bool = False,
    absorb: str = "by_cost",
    chunk: int | None = None,
    row_tile: int | None = None,
) -> TreePlan:
    """The plan of rows that belong to ``nodes``, in their order in ``q``.

    Args:
        nodes: any nodes of the pool, inner ones too, one of them several times too.
        row_counts: rows of each node, or of every node.
        query_heads: H.
        causal: False: every row sees its whole path (decoding; the noisy rows of a block). True:
            the rows of a node are the last tokens of its path (a prefill of nodes just appended).
        absorb: whether the keys of a run are read again for each child where that costs less than
            a state a row ("by_cost"), "never" or "always" (paged decoding without sharing).
        chunk: about how many keys an item has; None: as many as keep all workers busy.
        row_tile: most rows of an item.
    """
    if isinstance(row_counts, int):
        row_counts = [row_counts] * len(nodes)
    _check_plan(pool, query_heads, absorb, chunk, row_tile)
    group = query_heads // pool.key_heads
    executor = executor_of(pool.device)
    lines = CPU_LINES if executor is None else CUDA_LINES
    workers = num_threads() if executor is None else device_facts(executor, pool.device)[0]
    row_tile = max(lines // group, 1) if row_tile is None else row_tile
    # a state is written and read: d + 1 float32 numbers a query head, against 2 d of each key head
    state_tokens = group * (4 * pool.width + 4) / (pool.width * pool.dtype.itemsize)
    made = extension().plan_tree(
        pool.core,
        list(nodes),
        list(row_counts),
        causal,
        (
            row_tile,
            0 if chunk is None else chunk,
            pool.key_heads,
            workers,
            ABSORB.index(absorb),
        ),
        state_tokens,
    )
    packed = torch.empty(made.numbers, dtype=torch.int32)
    made.copy(packed.data_ptr())
    return TreePlan(
        packed=packed.to(pool.device),
        sizes=made.sizes,
        nodes=tuple(nodes),
        row_counts=tuple(row_counts),
        causal=causal,
        query_heads=query_heads,
        row_tile=row_tile,
        unique_tokens=made.unique_tokens,
        read_tokens=made.read_tokens,
        version=pool.core.version,
    )


def tree_attention(
    q: Tensor, pool: TreeKVPool, plan: TreePlan, *, layer: int = 0, scale: float | None = None
) -> AttentionState:
    """``out`` [T, H, d] in the type of ``q`` and ``lse`` [T, H] in float32 (float64 for float64).

    ``q`` [T, H, d] in the type of the pool; rows and heads may be strided. ``scale`` defaults to
    d ** -0.5. A row that sees no key gives zeros and -inf. No gradients: training attends through
    ``Visibility.tree``. The state can be merged with attention over keys outside of the pool, such
    as those of a block that is being denoised (``merge_attention_states``). Equal calls with equal
    plans give equal bits, whatever the number of threads. On CUDA: float32 and 16-bit numbers,
    heads up to 256 wide.
    """
    _check(q, pool, plan)
    check_device("tree_attention", q=q)
    scale = float(pool.width**-0.5 if scale is None else scale)
    sizes = [*plan.sizes, pool.page, plan.row_tile]
    return AttentionState(*_tree_attention(q, pool.layer(layer), plan.packed, sizes, scale))


def tree_attention_ref(
    q: Tensor, pool: TreeKVPool, plan: TreePlan, *, layer: int = 0, scale: float | None = None
) -> AttentionState:
    """The definition: plain attention of every row over its whole path, in the type of ``q``, which
    may be wider than the pool's. Every backend and every plan must match it."""
    scale = pool.width**-0.5 if scale is None else scale
    group = plan.query_heads // pool.key_heads
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, q.shape[1])]
    for node, rows_nHd in zip(plan.nodes, q.split(list(plan.row_counts)), strict=True):
        kv = pool.read(layer, pool.path_slots(node))
        key_KHd, value_KHd = (x.to(q.dtype).repeat_interleave(group, dim=1) for x in kv)
        score_Hnk = torch.einsum("nhd,khd->hnk", rows_nHd, key_KHd) * scale
        num_rows, num_keys = score_Hnk.shape[1:]
        if plan.causal:
            seen = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device)
            seen = seen.tril(num_keys - num_rows)
            score_Hnk = score_Hnk.masked_fill(~seen, -torch.inf)
        lses.append(score_Hnk.logsumexp(-1).T if num_keys else rows_nHd[..., 0] * 0 - torch.inf)
        outs.append(torch.einsum("hnk,khd->nhd", score_Hnk.softmax(-1), value_KHd))
    return AttentionState(torch.cat(outs), torch.cat(lses))


@torch.library.custom_op("dlm_fast::tree_attention", mutates_args=(), device_types=("cpu", "cuda"))
def _tree_attention(
    q: Tensor, kv: Tensor, packed: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    q = q if q.stride(2) == 1 else q.contiguous()
    *plan_sizes, page, row_tile = sizes
    core = extension()
    if core.tree_plan_numbers(plan_sizes) != packed.numel():
        raise ValueError("tree_attention: the packed plan does not have the sizes given with it")
    inputs = core.TreeAttentionInputs(
        (q.shape[0], q.shape[1], kv.shape[3], q.shape[2]),
        FLOAT_DTYPES.index(q.dtype),
        (q.data_ptr(), q.stride(0), q.stride(1)),
        (kv.data_ptr(), page, *kv.stride()[:4]),
        packed.data_ptr(),
        plan_sizes,
        scale,
        num_threads(),
    )
    executor, dtype = executor_of(q.device), output_dtype(q.dtype)
    lse = q.new_empty(q.shape[:2], dtype=dtype)
    if executor is None:
        out = q.new_empty(q.shape, dtype=dtype)
        core.tree_attention_cpu(inputs, *addresses(out, lse))
        return out.to(q.dtype), lse
    out, num_slots = torch.empty_like(q, memory_format=torch.contiguous_format), plan_sizes[5]
    states = lse.new_empty(num_slots, *q.shape[1:])
    state_lse = lse.new_empty(num_slots, q.shape[1])
    places = addresses(out, lse, states, state_lse)
    for plan in core.plan_tree_attention(inputs, places, row_tile):
        executor.launch(plan, q.device)
    return out, lse


@_tree_attention.register_fake
def _(
    q: Tensor, kv: Tensor, packed: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=output_dtype(q.dtype))


def _check_plan(
    pool: TreeKVPool, query_heads: int, absorb: str, chunk: int | None, row_tile: int | None
) -> None:
    op = "plan_tree_attention"
    if query_heads < 1 or query_heads % pool.key_heads:
        raise ValueError(
            f"{op}: query_heads={query_heads} is not a multiple of the pool's {pool.key_heads} key "
            "heads"
        )
    if absorb not in ABSORB:
        raise ValueError(f"{op}: absorb must be one of {ABSORB}, got {absorb!r}")
    for name, value in (("chunk", chunk), ("row_tile", row_tile)):
        if value is not None and value < 1:
            raise ValueError(f"{op}: {name} must be at least 1 or None, got {value}")


def _check(q_THd: Tensor, pool: TreeKVPool, plan: TreePlan) -> None:
    op = "tree_attention"
    check_dtype(op, "q", q_THd, pool.dtype)
    shape = (plan.num_rows, plan.query_heads, pool.width)
    if q_THd.shape != shape:
        raise ValueError(
            f"{op}: q must be {list(shape)} (rows and heads of the plan, width of the pool), got "
            f"{list(q_THd.shape)}"
        )
    if q_THd.device != plan.packed.device:
        raise ValueError(
            f"{op}: q lies on {q_THd.device} but the pool on {plan.packed.device}; move it there"
        )
    if plan.version != pool.core.version:
        # some page changed hands since: fine as long as none of the plan's did
        pool.core.check_usable(list(plan.nodes))
