"""The rows of one forward whose paths lie in a pool of keys: they stand for a ``Visibility``.

T new rows of a forward, H query heads, G key heads, d head width; a blocks of n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dlm_fast.models.kv_cache import CachedRows
from dlm_fast.ops import (
    AttentionState,
    TreeKVPool,
    TreePlan,
    merge_attention_states,
    plan_tree_attention,
    tree_attention,
)
from dlm_fast.ops.segment_attention import segment_attention
from dlm_fast.ops.visibility import Visibility


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolRows:
    """Rows of several paths, consecutive ones of each."""

    pool: TreeKVPool
    row_counts: tuple[int, ...]
    """rows of each path"""
    position_ids: Tensor
    """int64 [T], position of each row on its path"""

    @property
    def num_queries(self) -> int:
        return sum(self.row_counts)

    @cached_property
    def pred(self) -> Tensor:
        """int32 [T], new row of the token before this one; -1 where it is not among them."""
        pred_T = torch.arange(-1, self.num_queries - 1)
        first_A = torch.tensor((0, *self.row_counts[:-1])).cumsum(0)
        pred_T[first_A[: len(self.row_counts)]] = -1
        return pred_T.to(self.position_ids.device, torch.int32)

    def to(self, device: torch.device | str) -> PoolRows:
        """Itself: the rows were laid out where the pool is."""
        if self.pool.device.type != torch.device(device).type:
            raise ValueError(
                f"the pool of keys lies on {self.pool.device}, the model on {device}; make it on "
                "the model's device"
            )
        return self

    def attend(
        self,
        layer: int,
        query_HTd: Tensor,
        key_GTd: Tensor,
        value_GTd: Tensor,
        scale: float | None = None,
    ) -> Tensor:
        """[H, T, d]: keeps what is to be kept, then attends."""
        q_THd, k_TGd, v_TGd = (x.transpose(0, 1) for x in (query_HTd, key_GTd, value_GTd))
        scale = query_HTd.shape[-1] ** -0.5 if scale is None else scale
        return self._attend(layer, q_THd, k_TGd, v_TGd, scale).transpose(0, 1)

    def _attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float
    ) -> Tensor:
        """The same, rows first."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class WrittenRows(PoolRows):
    """Rows whose keys and values are kept."""

    write_rows: Tensor
    """int64, which of them, before they are seen"""
    write_slots: Tensor
    """int64, their slots in the pool"""

    def _write(self, layer: int, k_TGd: Tensor, v_TGd: Tensor) -> None:
        if self.write_rows.numel() < self.num_queries:
            k_TGd, v_TGd = k_TGd[self.write_rows], v_TGd[self.write_rows]
        self.pool.write(layer, self.write_slots, k_TGd, v_TGd)


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeRows(WrittenRows):
    """The last tokens of paths. Keys that several paths share are read once for all of them."""

    plan: TreePlan
    """one for all layers"""

    @staticmethod
    def of(
        pool: TreeKVPool,
        nodes: Sequence[int],
        row_counts: Sequence[int],
        *,
        query_heads: int,
        write_rows: Tensor,
        write_slots: Tensor,
        causal: bool = True,
    ) -> TreeRows:
        """``row_counts`` last tokens of the paths to ``nodes``, which have room in the pool.
        ``causal``: each sees its path up to itself; False: all of it (one block at its end)."""
        plan = plan_tree_attention(pool, nodes, row_counts, query_heads=query_heads, causal=causal)
        return TreeRows(
            pool=pool,
            row_counts=tuple(row_counts),
            plan=plan,
            position_ids=_positions(pool, nodes, row_counts, behind=False),
            write_rows=write_rows,
            write_slots=write_slots,
        )

    def _attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float
    ) -> Tensor:
        """The definition is ``tree_attention_ref``."""
        self._write(layer, k_TGd, v_TGd)
        return tree_attention(q_THd, self.pool, self.plan, layer=layer, scale=scale).out


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRows(PoolRows):
    """Blocks behind the ends of paths: each row sees its path and its own block, whose keys are
    not kept."""

    plan: TreePlan

    @staticmethod
    def of(
        pool: TreeKVPool, nodes: Sequence[int], row_counts: Sequence[int], *, query_heads: int
    ) -> BlockRows:
        """A block of ``row_counts`` rows behind each of ``nodes``; one node may have several."""
        return BlockRows(
            pool=pool,
            row_counts=tuple(row_counts),
            plan=plan_tree_attention(pool, nodes, row_counts, query_heads=query_heads),
            position_ids=_positions(pool, nodes, row_counts, behind=True),
        )

    def _attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float
    ) -> Tensor:
        """Attention over the paths, merged with attention inside the blocks."""
        above = tree_attention(q_THd, self.pool, self.plan, layer=layer, scale=scale)
        with torch.autocast(q_THd.device.type, enabled=False):  # which rounds float32 products
            inside = self._inside(q_THd, k_TGd, v_TGd, scale)
        merged = merge_attention_states(
            torch.stack([above.out, inside.out], 1), torch.stack([above.lse, inside.lse], 1)
        )
        return merged.out

    def _inside(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float) -> AttentionState:
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q_THd.dtype, torch.float32)
        lse_TH = q_THd.new_empty(q_THd.shape[:2], dtype=wide)
        group = q_THd.shape[1] // k_TGd.shape[1]
        for rows_an in self._buckets:
            query, key, value = (x[rows_an].to(wide).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
            score_aHnn = query @ key.transpose(2, 3) * scale
            lse_aHn1 = score_aHnn.logsumexp(-1, keepdim=True)
            lse_TH[rows_an] = lse_aHn1[..., 0].transpose(1, 2)
            out_aHnd = (score_aHnn - lse_aHn1).exp() @ value
            out_THd[rows_an] = out_aHnd.transpose(1, 2).to(out_THd.dtype)
        return AttentionState(out_THd, lse_TH)

    @cached_property
    def _buckets(self) -> tuple[Tensor, ...]:
        """int64 [a, n], rows of blocks of equal length."""
        count_A = torch.tensor(self.row_counts)
        first_A = count_A.cumsum(0) - count_A
        return tuple(
            (first_A[count_A == n][:, None] + torch.arange(n)).to(self.position_ids.device)
            for n in sorted(set(self.row_counts))
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FillRows(WrittenRows):
    """A whole path at once, whose keys are computed for the pool: nothing is read from it."""

    visibility: Visibility

    @staticmethod
    def of(pool: TreeKVPool, visibility: Visibility, write_slots: Tensor) -> FillRows:
        """One path under ``visibility``; keys of its last tokens go to ``write_slots``."""
        length = visibility.num_queries
        return FillRows(
            pool=pool,
            row_counts=(length,),
            position_ids=visibility.position_ids.to(pool.device, torch.int64),
            write_rows=torch.arange(length - len(write_slots), length, device=pool.device),
            write_slots=write_slots,
            visibility=visibility.to(pool.device),
        )

    def _attend(
        self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, scale: float
    ) -> Tensor:
        """Attention under the visibility."""
        self._write(layer, k_TGd, v_TGd)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THd, k_TGd, v_TGd))
        return segment_attention(q, k, v, self.visibility, scale)[0].transpose(0, 1)


def _positions(
    pool: TreeKVPool, nodes: Sequence[int], row_counts: Sequence[int], *, behind: bool
) -> Tensor:
    """int64 [T], of rows at the ends of paths, or behind them."""
    count_A = torch.tensor(row_counts)
    first = []
    for node, count in zip(nodes, row_counts, strict=True):
        facts = pool.node(node)
        first.append(facts.start + facts.length - (0 if behind else count))
    shift_A = torch.tensor(first) - (count_A.cumsum(0) - count_A)
    position_T = torch.arange(int(count_A.sum())) + shift_A.repeat_interleave(count_A)
    return position_T.to(pool.device)


KeptRows = CachedRows | PoolRows
"""rows of a forward whose other keys are kept"""
