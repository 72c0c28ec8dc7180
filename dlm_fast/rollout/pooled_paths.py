"""One token for each of many paths with kept keys: every token of a tree goes through once.

Letters: ``T`` packed new tokens of one forward, ``A`` paths of it, ``N`` tokens that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.models.tree_rows import TreeRows
from dlm_fast.ops import TokenStats, TreeKVPool
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_network import Drawing, append_drawn, sources_of
from dlm_fast.rollout.path_nodes import PathNode

_PAGE = 16
"""tokens of a page where rollout.cache_page leaves it open"""


@dataclass(frozen=True, kw_only=True)
class _Feed:
    """New tokens at the end of one path."""

    handle: int
    """of the path's last node"""
    tokens: Sequence[int]
    is_written: bool
    """they are kept; else they are kept already, and predict once more"""


class PooledPaths:
    """Keys lie in a ``TreeKVPool``, one pool node per node of the tree. Finished paths may lose
    their pages when there are no free ones, and are computed again if they are continued."""

    def __init__(
        self, policy: Any, forward: Forward, drawing: Drawing, pool: TreeKVPool | None = None
    ) -> None:
        self._policy, self._forward, self._drawing = policy, forward, drawing
        sampler = drawing.sampler
        self.pool = pool or pool_for(policy, sampler.cache_page or _PAGE, sampler.cache_pages)
        self._query_heads = policy.config.num_attention_heads
        self.tokens_forwarded = 0

    def step(self, nodes: Sequence[PathNode]) -> None:
        sources, source_N = sources_of(nodes)
        feeds, slots = self._feeds(sources)
        last_A = torch.tensor([len(feed.tokens) for feed in feeds]).cumsum(0) - 1
        rows_N = last_A[source_N].to(self.pool.device, torch.int32)
        stats = self._run(feeds, slots, rows_N, **self._drawing.options(nodes))
        for source in sources:
            source.kept = len(source.tokens)
        append_drawn(nodes, stats, self._drawing.eos_ids)

    def finish(self, node: PathNode) -> None:
        if node.is_pinned:
            self.pool.unpin(node.handle)
            node.is_pinned = False

    def split(self, node: PathNode, count: int) -> PathNode:
        handle = node.handle
        if handle < 0 or count > node.kept:
            raise ValueError(
                f"a node cannot be cut after {count} of its tokens, of which {node.kept} are kept"
            )
        if count == node.kept:  # all of the pool's node lies above the cut
            upper = node.split(count)
            upper.handle, node.handle = handle, -1
            upper.is_pinned, node.is_pinned = node.is_pinned, False
        else:
            upper_handle = self.pool.split(handle, count)
            self.pool.hold(upper_handle)
            upper = node.split(count)
            upper.handle = upper_handle
        return upper

    def forget(self, nodes: Sequence[PathNode]) -> None:
        for node in reversed(nodes):
            if node.handle >= 0:
                self.pool.release(node.handle)
                node.handle, node.is_pinned, node.kept = -1, False, 0

    def _feeds(self, sources: Sequence[PathNode]) -> tuple[list[_Feed], Tensor]:
        """Makes room for what is new at the end of each path, and says where. What is not new, the
        last token of a path that is continued again, only predicts."""
        for source in sources:
            self._open(source)
        feeds = [
            _Feed(
                handle=source.handle,
                tokens=source.tokens[source.kept :] or source.tokens[-1:],
                is_written=source.kept < len(source.tokens),
            )
            for source in sources
        ]
        growing = [feed for feed in feeds if feed.is_written]
        slots = self.pool.append(
            [feed.handle for feed in growing],
            [token for feed in growing for token in feed.tokens],
            [len(feed.tokens) for feed in growing],
        )
        return feeds, slots

    def _open(self, source: PathNode) -> None:
        """The node has a place in the pool, its path is computed and stays."""
        parent = source.parent
        if source.handle >= 0:
            self._pin(source)
        elif parent is None:
            source.handle, source.is_pinned = self.pool.alloc(), True
        else:
            self._pin(parent)
            source.handle, source.is_pinned = self.pool.fork(parent.handle)[0], True
            self.finish(parent)  # its child keeps its pages from now on

    def _pin(self, node: PathNode) -> None:
        if node.is_pinned:
            return
        refill = self.pool.pin([node.handle])
        node.is_pinned = True
        if refill.nodes:
            feed = _Feed(handle=node.handle, tokens=refill.token_ids.tolist(), is_written=True)
            none = torch.empty(0, dtype=torch.int32, device=self.pool.device)
            self._run([feed], refill.slots, none, temperature=0.0)

    def _run(
        self, feeds: Sequence[_Feed], slots: Tensor, rows_N: Tensor, **draw: Any
    ) -> TokenStats:
        """One forward; ``slots``: of the tokens that are written."""
        device = self.pool.device
        counts = [len(feed.tokens) for feed in feeds]
        written = torch.tensor([feed.is_written for feed in feeds]).repeat_interleave(
            torch.tensor(counts)
        )
        rows = TreeRows.of(
            self.pool,
            [feed.handle for feed in feeds],
            counts,
            query_heads=self._query_heads,
            write_rows=written.nonzero()[:, 0].to(device),
            write_slots=slots,
        )
        ids_T = torch.tensor([token for feed in feeds for token in feed.tokens], device=device)
        self.tokens_forwarded += ids_T.numel()
        return self._forward(ids_T, rows, rows=rows_N, **draw)


def pool_for(policy: Any, page: int, max_pages: int | None) -> TreeKVPool:
    """A pool for the keys of a policy, in the type its attention computes in."""
    config, device = policy.config, policy.device
    heads = config.num_attention_heads
    dtype = policy.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return TreeKVPool(
        num_layers=config.num_hidden_layers,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        page=page,
        max_pages=max_pages,
        dtype=dtype,
        device=device,
    )
