"""One token for each of many paths with kept keys: every token of a tree goes through once.

Letters: ``T`` packed new tokens of one forward, ``N`` tokens that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.models.tree_rows import TreeRows
from dlm_fast.ops import Refill, TokenStats
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_network import Drawing, append_drawn, sources_of
from dlm_fast.rollout.path_nodes import PathNode
from dlm_fast.rollout.pool_keeper import PoolKeeper, pool_for


@dataclass(frozen=True, kw_only=True)
class _Feed:
    """New tokens at the end of one path."""

    handle: int
    """of the path's last node"""
    tokens: Sequence[int]
    is_written: bool
    """they are kept; else they are kept already, and predict once more"""


class PooledPaths(PoolKeeper):
    """Keys lie in a ``TreeKVPool``; a forward takes the new tokens alone."""

    def __init__(self, policy: Any, forward: Forward, drawing: Drawing) -> None:
        self._forward, self._drawing = forward, drawing
        sampler = drawing.sampler
        self.pool = pool_for(policy, sampler.cache_page, sampler.cache_pages)
        self._query_heads = policy.config.num_attention_heads
        self.tokens_forwarded = 0

    def step(self, nodes: Sequence[PathNode]) -> None:
        """One token for each node; see ``PathNetwork``."""
        sources, source_N = sources_of(nodes)
        feeds, slots = self._feeds(sources)
        last_A = torch.tensor([len(feed.tokens) for feed in feeds]).cumsum(0) - 1
        rows_N = last_A[source_N].to(self.pool.device, torch.int32)
        stats = self._run(feeds, slots, rows_N, **self._drawing.options(nodes))
        for source in sources:
            source.kept = len(source.tokens)
        append_drawn(nodes, stats, self._drawing.eos_ids)

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

    def _fill(self, node: PathNode, refill: Refill) -> None:
        feed = _Feed(handle=node.handle, tokens=refill.token_ids.tolist(), is_written=True)
        none = torch.empty(0, dtype=torch.int32, device=self.pool.device)
        self._run([feed], refill.slots, none, temperature=0.0)

    def _run(
        self, feeds: Sequence[_Feed], slots: Tensor, rows_N: Tensor, **draw: Any
    ) -> TokenStats:
        """One forward; ``slots``: of the tokens that are written."""
        device = self.pool.device
        counts = [len(feed.tokens) for feed in feeds]
        is_written = torch.tensor([feed.is_written for feed in feeds])
        written_T = is_written.repeat_interleave(torch.tensor(counts))
        rows = TreeRows.of(
            self.pool,
            [feed.handle for feed in feeds],
            counts,
            query_heads=self._query_heads,
            write_rows=written_T.nonzero()[:, 0].to(device),
            write_slots=slots,
        )
        ids_T = torch.tensor([token for feed in feeds for token in feed.tokens], device=device)
        self.tokens_forwarded += ids_T.numel()
        return self._forward(ids_T, rows, rows=rows_N, **draw)
