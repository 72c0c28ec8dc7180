"""The rows of one forward whose paths lie in a pool of keys: ends of the paths of prefix trees.

T new rows of a forward, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dlm_fast.models.kv_cache import CachedRows
from dlm_fast.ops import TreeKVPool, TreePlan, plan_tree_attention, tree_attention


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeRows:
    """The last tokens of paths, each seeing its path up to itself. Stands where a ``Visibility``
    stands. Keys that several paths share are read once for all of them."""

    pool: TreeKVPool
    plan: TreePlan
    """one for all layers; the rows of a node are the last tokens of its path"""
    position_ids: Tensor
    """int64 [T], position of each row on its path"""
    write_rows: Tensor
    """int64, rows whose keys and values are kept, before they are seen"""
    write_slots: Tensor
    """int64, their slots in the pool"""

    @staticmethod
    def of(
        pool: TreeKVPool,
        nodes: Sequence[int],
        row_counts: Sequence[int],
        *,
        query_heads: int,
        write_rows: Tensor,
        write_slots: Tensor,
    ) -> TreeRows:
        """``row_counts`` last tokens of the paths to ``nodes``, which have room in the pool."""
        plan = plan_tree_attention(pool, nodes, row_counts, query_heads=query_heads, causal=True)
        ends = []
        for node in nodes:
            facts = pool.node(node)
            ends.append(facts.start + facts.length)
        count_A = torch.tensor(row_counts)
        shift_A = torch.tensor(ends) - count_A.cumsum(0)
        position_T = torch.arange(int(count_A.sum())) + shift_A.repeat_interleave(count_A)
        return TreeRows(
            pool=pool,
            plan=plan,
            position_ids=position_T.to(pool.device),
            write_rows=write_rows,
            write_slots=write_slots,
        )

    @property
    def num_queries(self) -> int:
        return self.plan.num_rows

    @cached_property
    def pred(self) -> Tensor:
        """int32 [T], new row of the token before this one; -1 where it is not among them."""
        pred_T = torch.arange(-1, self.num_queries - 1)
        first_A = torch.tensor((0, *self.plan.row_counts[:-1])).cumsum(0)
        pred_T[first_A[: len(self.plan.row_counts)]] = -1
        return pred_T.to(self.position_ids.device, torch.int32)

    def to(self, device: torch.device | str) -> TreeRows:
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
        """[H, T, d]: keeps the new keys and values, then attends. The definition is
        ``tree_attention_ref``."""
        key_TGd, value_TGd = key_GTd.transpose(0, 1), value_GTd.transpose(0, 1)
        if self.write_rows.numel() < self.num_queries:
            key_TGd, value_TGd = key_TGd[self.write_rows], value_TGd[self.write_rows]
        self.pool.write(layer, self.write_slots, key_TGd, value_TGd)
        query_THd = query_HTd.transpose(0, 1)
        state = tree_attention(query_THd, self.pool, self.plan, layer=layer, scale=scale)
        return state.out.transpose(0, 1)


KeptRows = CachedRows | TreeRows
"""rows of a forward whose other keys are kept"""
