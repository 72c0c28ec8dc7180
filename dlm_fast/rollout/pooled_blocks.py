"""Blocks of many paths with kept keys: a finished block's keys are computed once, before the fork.

The block under denoising is never in the pool: its keys live in the forward alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlm_fast.models.tree_rows import BlockRows, FillRows, TreeRows
from dlm_fast.ops import Refill, TokenStats
from dlm_fast.ops.visibility import Visibility
from dlm_fast.rollout.block_paths import BlockPaths, Opened
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_network import Drawing
from dlm_fast.rollout.path_nodes import PathNode
from dlm_fast.rollout.pool_keeper import PoolKeeper, pool_for


class PooledBlocks(PoolKeeper, BlockPaths):
    """A root's node in the pool holds the whole blocks of the prompt; what the prompt has of its
    last block stands first in the nodes of the root's children."""

    def __init__(self, policy: Any, forward: Forward, drawing: Drawing) -> None:
        super().__init__(policy, forward, drawing)
        sampler = drawing.sampler
        self.pool = pool_for(policy, sampler.cache_page, sampler.cache_pages)
        self._query_heads = policy.config.num_attention_heads

    def forget(self, nodes: Sequence[PathNode]) -> None:
        PoolKeeper.forget(self, nodes)
        BlockPaths.forget(self, nodes)

    def _prepare(self, nodes: Sequence[PathNode]) -> None:
        """Keys of all finished blocks of the paths are in the pool."""
        finished: dict[PathNode, None] = {}
        for node in nodes:
            source = self._source(node)
            root = node.path()[0]
            if root.handle < 0:
                self._fill_prompt(root)
            if source.kept < len(source.tokens):
                finished[source] = None
            elif source.handle >= 0:
                self._pin(source)
        if finished:
            self._commit(list(finished))

    def _source(self, node: PathNode) -> PathNode:
        """The node that a node's open block stands behind."""
        if node.tokens:
            return node
        assert node.parent is not None
        return node.parent

    def _fill_prompt(self, root: PathNode) -> None:
        whole = root.tokens[: len(root.tokens) // self._size * self._size]
        handle = self.pool.alloc(whole)
        root.handle, root.is_pinned, root.kept = handle, True, len(root.tokens)
        if whole:
            self._fill_path(whole, self.pool.slots(handle))

    def _commit(self, sources: Sequence[PathNode]) -> None:
        """The last block of each, in one forward; each has exactly one that is not kept."""
        for source in sources:
            self._open(source)
        new = [self._lead_tokens(s) * (not s.kept) + s.tokens[s.kept :] for s in sources]
        handles = [source.handle for source in sources]
        counts = [len(tokens) for tokens in new]
        ids = [token for tokens in new for token in tokens]
        slots = self.pool.append(handles, ids, counts)
        rows = TreeRows.of(
            self.pool,
            handles,
            counts,
            query_heads=self._query_heads,
            write_rows=torch.arange(len(ids), device=self.pool.device),
            write_slots=slots,
            causal=False,
        )
        self._forward_keys(ids, rows)
        for source in sources:
            source.kept = len(source.tokens)

    def _statistics(
        self, opened: Sequence[Opened], at_N: tuple[Tensor, Tensor], draw: dict[str, Any]
    ) -> TokenStats:
        count_A = torch.tensor([len(block.ids) for _, block in opened])
        rows = BlockRows.of(
            self.pool,
            [self._source(node).handle for node, _ in opened],
            count_A.tolist(),
            query_heads=self._query_heads,
        )
        ids = [token for _, block in opened for token in block.ids]
        ids_T = torch.tensor(ids, device=self._device)
        self.tokens_forwarded += ids_T.numel()
        rows_N = (count_A.cumsum(0) - count_A)[at_N[0]] + at_N[1]
        return self._forward(ids_T, rows, rows=rows_N.to(self._device, torch.int32), **draw)

    def _lead_tokens(self, node: PathNode) -> list[int]:
        root = node.parent
        if root is None or root.parent is not None:
            return []
        return root.tokens[len(root.tokens) // self._size * self._size :]

    def _lead(self, node: PathNode) -> int:
        return len(self._lead_tokens(node))

    def _fill(self, node: PathNode, refill: Refill) -> None:
        self._fill_path(self.pool.path_tokens(node.handle), refill.slots)

    def _fill_path(self, ids: Sequence[int], slots: Tensor) -> None:
        """Keys of the last tokens of a path of whole blocks; the path goes through in full."""
        visibility = Visibility.block_causal([len(ids)], self._size)
        self._forward_keys(ids, FillRows.of(self.pool, visibility, slots))

    def _forward_keys(self, ids: Sequence[int], rows: TreeRows | FillRows) -> None:
        none = torch.empty(0, dtype=torch.int32, device=self.pool.device)
        self.tokens_forwarded += len(ids)
        self._forward(torch.tensor(ids, device=self.pool.device), rows, rows=none, temperature=0.0)
