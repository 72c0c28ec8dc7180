"""One token for each of many paths with kept keys: every token of a tree goes through once.

Letters: ``T`` packed new tokens of one forward, ``A`` paths of it, ``K`` tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.models.kv_cache import CachedRows, KeyValueStore
from dlm_fast.ops import TokenStats, TreeKVPool
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_network import Drawing, append_drawn, sources_of
from dlm_fast.rollout.path_nodes import PathNode

_PAGE = 16
"""tokens of a page where rollout.cache_page leaves it open"""


class PoolStore(KeyValueStore):
    """The pages of a pool as numbered slots: a page's keys and its values lie one after the other,
    so the value of a slot is found a page further on."""

    def __init__(self, pool: TreeKVPool) -> None:
        super().__init__()
        self._pool = pool

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        page = self._pool.page
        flat_SGd = self._pool.layer(index).flatten(0, 2)
        self.num_slots = flat_SGd.shape[0] - page
        return flat_SGd[:-page], flat_SGd[page:]

    def write(self, index: int, slots_T: Tensor, key_TGd: Tensor, value_TGd: Tensor) -> None:
        page = self._pool.page
        flat_SGd = self._pool.layer(index).flatten(0, 2)
        flat_SGd.index_copy_(0, slots_T, key_TGd.detach())
        flat_SGd.index_copy_(0, slots_T + page, value_TGd.detach())


@dataclass(frozen=True, kw_only=True)
class _Feed:
    """New tokens of one path."""

    tokens: list[int]
    slots_K: Tensor
    """pool slots of the whole path"""
    num_written: int
    """the first so many of the tokens are kept"""


class PooledPaths:
    """Keys lie in a ``TreeKVPool``, one pool node per node of the tree. Finished paths may lose
    their pages when there are no free ones, and are computed again if they are continued."""

    def __init__(
        self, policy: Any, forward: Forward, drawing: Drawing, pool: TreeKVPool | None = None
    ) -> None:
        self._policy, self._forward, self._drawing = policy, forward, drawing
        sampler = drawing.sampler
        self.pool = pool or pool_for(policy, sampler.cache_page or _PAGE, sampler.cache_pages)
        self._store = PoolStore(self.pool)
        self._before: dict[int, Tensor] = {}
        """handle of a node -> slots of the path before it"""
        self.tokens_forwarded = 0

    def step(self, nodes: Sequence[PathNode]) -> None:
        sources, source_N = sources_of(nodes)
        feeds = self._feeds(sources)
        last_A = torch.tensor([len(feed.tokens) for feed in feeds]).cumsum(0) - 1
        rows_N = last_A[source_N].to(self.pool.device, torch.int32)
        stats = self._run(feeds, rows_N, **self._drawing.options(nodes))
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
        self._before.clear()
        return upper

    def forget(self, nodes: Sequence[PathNode]) -> None:
        for node in reversed(nodes):
            if node.handle >= 0:
                self._before.pop(node.handle, None)
                self.pool.release(node.handle)
                node.handle, node.is_pinned, node.kept = -1, False, 0

    def _feeds(self, sources: Sequence[PathNode]) -> list[_Feed]:
        """Makes room for what is new at the end of each path; what is not new, the last token of
        a path that is continued again, only predicts."""
        for source in sources:
            self._open(source)
        growing = [source for source in sources if source.kept < len(source.tokens)]
        handles = [source.handle for source in growing]
        new = [source.tokens[source.kept :] for source in growing]
        self.pool.append(handles, [t for tokens in new for t in tokens], list(map(len, new)))
        feeds = []
        for source in sources:
            tokens = source.tokens[source.kept :]
            feeds.append(
                _Feed(
                    tokens=tokens or source.tokens[-1:],
                    slots_K=self._path_slots(source),
                    num_written=len(tokens),
                )
            )
        return feeds

    def _path_slots(self, node: PathNode) -> Tensor:
        own_K = self.pool.slots(node.handle)
        if node.parent is None:
            return own_K
        if node.handle not in self._before:
            self._before[node.handle] = self.pool.path_slots(node.parent.handle)
        return torch.cat([self._before[node.handle], own_K])

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
            self._before.clear()
            tokens = refill.token_ids.tolist()
            feed = _Feed(
                tokens=tokens,
                slots_K=self.pool.path_slots(node.handle),
                num_written=len(tokens),
            )
            none = torch.empty(0, dtype=torch.int32, device=self.pool.device)
            self._run([feed], none, temperature=0.0)

    def _run(self, feeds: Sequence[_Feed], rows_N: Tensor, **draw: Any) -> TokenStats:
        ids_T, cached = self._lay_out(feeds)
        self.tokens_forwarded += ids_T.numel()
        return self._forward(ids_T, cached, rows=rows_N, **draw)

    def _lay_out(self, feeds: Sequence[_Feed]) -> tuple[Tensor, CachedRows]:
        device, page = self.pool.device, self.pool.page
        slots_AK = torch.nn.utils.rnn.pad_sequence([feed.slots_K for feed in feeds], True)
        slots_AK = slots_AK + slots_AK // page * page  # values lie between the pages' keys
        length_A = torch.tensor([feed.slots_K.numel() for feed in feeds], device=device)
        count_A = torch.tensor([len(feed.tokens) for feed in feeds], device=device)
        member_T = torch.arange(len(feeds), device=device).repeat_interleave(count_A)
        place_T = torch.arange(member_T.numel(), device=device)
        place_T = place_T - (count_A.cumsum(0) - count_A)[member_T]
        position_T = (length_A - count_A)[member_T] + place_T
        written_A = torch.tensor([feed.num_written for feed in feeds], device=device)
        written = (place_T < written_A[member_T]).nonzero()[:, 0]
        cached = CachedRows(
            store=self._store,
            slots=slots_AK,
            key_lengths=tuple(length_A.tolist()),
            row_lengths=tuple(count_A.tolist()),
            position_ids=position_T,
            seen=position_T + 1,
            write_rows=written,
            write_slots=slots_AK[member_T[written], position_T[written]],
        )
        ids = [token for feed in feeds for token in feed.tokens]
        return torch.tensor(ids, device=device), cached


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
