"""Keys and values of prefix trees in pages: each token once, forks without a copy.

A node is a run of tokens that continues its parent's path. Every node starts on a page of its own,
so a fork is a new empty node; only its parent's pages are shared, by being read. Keys are stored
after rotary embedding at positions of the path, so they are the same for all descendants.

G key heads, d head width, P pages, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops._common import check_dtype, extension
from dlm_fast.ops._head_inputs import FLOAT_DTYPES

LAYOUTS = ("token", "head")


class TreePoolExhausted(RuntimeError):
    """No page is free and nothing can be evicted. Nothing was changed but evictions."""


@dataclass(frozen=True, kw_only=True)
class PoolNode:
    """What the pool knows of a node."""

    parent: int
    """its parent's handle; -1: the node is a root"""
    start: int
    """tokens of the path before the node"""
    length: int
    """tokens of the node"""
    children: int
    """children that live"""
    holds: int
    """handles given out or held, and not released"""
    pins: int
    """while above 0 the pages stay"""
    is_sealed: bool
    """it was forked: nothing is appended any more"""
    is_evicted: bool
    """its pages were taken; its tokens are known"""
    epoch: int
    """the pool's epoch when it was made"""


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Counts of the pool, exact."""

    used_pages: int
    """pages that belong to a node"""
    peak_pages: int
    """most pages in use at once so far"""
    used_bytes: int
    """of the used pages in the layers that were written"""
    nodes: int
    """nodes that live"""
    tokens: int
    """tokens that have a place: each once, however many paths share it"""
    evicted_nodes: int
    """nodes without pages"""
    evicted_tokens: int
    """their tokens"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Refill:
    """Tokens whose keys and values have to be computed again: parents first, one forward for all
    of them under ``Visibility.tree``."""

    nodes: tuple[int, ...]
    """handles"""
    token_ids: Tensor
    """int64 [T], of all nodes one after the other"""
    position_ids: Tensor
    """int64 [T], positions on their paths"""
    slots: Tensor
    """int64 [T], where ``write`` puts them"""


class TreeKVPool:
    """Pages of keys and values under one numbering for all layers, and the trees that own them.

    ``alloc`` and ``fork`` give handles that the caller holds and pins; ``release`` gives one back.
    A node lives while it is held or a child lives; its pages stay while it is pinned or a child has
    pages. Wrong use (a node released, of an older epoch, sealed or evicted) raises ``ValueError``
    that says which; a full pool raises ``TreePoolExhausted`` (a ``RuntimeError``) with the sizes.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        key_heads: int,
        width: int,
        page: int = 16,
        max_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: str = "token",
    ) -> None:
        """``page``: tokens of a page, a power of two. ``max_pages``: most pages at once; None: as
        many as are needed. Memory grows with the pages in use and is kept. ``layout``: which lie
        next to each other in a page, the heads of a "token" or the tokens of a "head"; arrays look
        the same in both."""
        check_dtype("TreeKVPool", "dtype", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
        for name, value in (("num_layers", num_layers), ("key_heads", key_heads), ("width", width)):
            if value < 1:
                raise ValueError(f"TreeKVPool: {name} must be at least 1, got {value}")
        if max_pages is not None and max_pages < 1:
            raise ValueError(f"TreeKVPool: max_pages must be at least 1 or None, got {max_pages}")
        if layout not in LAYOUTS:
            raise ValueError(f"TreeKVPool: layout must be one of {LAYOUTS}, got {layout!r}")
        self.num_layers, self.key_heads, self.width = num_layers, key_heads, width
        self.page, self.dtype, self.device = page, dtype, torch.device(device)
        self._layout, self._max_pages = layout, max_pages
        self.core: Any = extension().TreePool(page, -1 if max_pages is None else max_pages)
        self._layers: dict[int, Tensor] = {}

    # --- nodes

    def alloc(self, token_ids: Sequence[int] | Tensor = ()) -> int:
        """A new root with these tokens; ``slots(node)`` is where to write their keys."""
        node = self.core.alloc()
        try:
            self.append([node], token_ids)
        except BaseException:
            self.core.release(node)
            raise
        return node

    def find_root(self, token_ids: Sequence[int] | Tensor) -> int | None:
        """A root with exactly these tokens that has been forked in this epoch; not held."""
        node = self.core.find_root(_integers(token_ids))
        return None if node < 0 else node

    def fork(self, node: int, count: int = 1) -> list[int]:
        """``count`` new empty children; the node is sealed. Nothing is copied."""
        return self.core.fork(node, count)

    def append(
        self,
        nodes: Sequence[int],
        token_ids: Sequence[int] | Tensor,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Makes room at the ends of open nodes: int64 [T] slots for ``write``.

        ``token_ids`` [T] of all nodes one after the other, ``counts`` of them for each node; None:
        equally many. All or nothing happens."""
        token_ids = _integers(token_ids)
        if counts is None:
            if len(token_ids) % max(len(nodes), 1) or (token_ids and not nodes):
                raise ValueError(
                    f"TreeKVPool.append: {len(token_ids)} tokens cannot be shared equally by "
                    f"{len(nodes)} nodes; give counts"
                )
            counts = [len(token_ids) // len(nodes)] * len(nodes) if nodes else []
        with _exhaustion():
            slots = self.core.append(list(nodes), list(counts), token_ids)
        return self._tensor(slots)

    def hold(self, node: int) -> None:
        """One more ``release`` is due."""
        self.core.hold(node)

    def release(self, node: int) -> None:
        """Gives a handle back, and a pin with it. A node that nobody holds and that has no child
        frees its pages and counts as its parent's child no longer."""
        self.core.release(node)

    def pin(self, nodes: Sequence[int]) -> Refill:
        """Keeps the pages of held nodes and of all above them, from now on. What was evicted gets
        pages again and has to be computed and written before it is read."""
        with _exhaustion():
            handles, tokens, positions, slots = self.core.pin(list(nodes))
        return Refill(
            nodes=tuple(handles),
            token_ids=self._tensor(tokens),
            position_ids=self._tensor(positions),
            slots=self._tensor(slots),
        )

    def unpin(self, node: int) -> None:
        """The node's pages may be taken when pages run out; its tokens stay known."""
        self.core.unpin(node)

    def split(self, node: int, count: int) -> int:
        """Cuts a node after ``count`` of its tokens; returns the new node above the cut, which is
        held by its child alone. ``node`` goes on to name the end of the path. A cut inside a page
        copies the tokens of that page before it; a cut between pages copies nothing."""
        with _exhaustion():
            upper, from_page, to_page, begin, end = self.core.split(node, count)
        if to_page >= 0:
            for layer in self._layers:
                kv = self.layer(layer)
                kv[to_page, :, begin:end] = kv[from_page, :, begin:end]
        return upper

    def evict(self, num_pages: int) -> int:
        """Frees pages of nodes without pin, the longest unused first; how many were freed. Happens
        by itself when pages run out."""
        return self.core.evict(num_pages)

    def advance_epoch(self) -> None:
        """The weights changed: from now on the nodes there are can only be released."""
        self.core.advance_epoch()

    @property
    def epoch(self) -> int:
        """How often the weights have changed."""
        return self.core.epoch

    # --- keys and values

    def layer(self, index: int) -> Tensor:
        """[P, 2, page, G, d] keys (0) and values (1) of a layer; undefined where not written."""
        if not 0 <= index < self.num_layers:
            raise ValueError(f"TreeKVPool: layer {index} of {self.num_layers} does not exist")
        held = self._layers.get(index)
        num_pages = self.core.made_pages
        if held is None or held.shape[0] < num_pages:
            held = self._layers[index] = self._grown(held, num_pages)
        return held

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Keeps keys and values [T, G, d] of the tokens at ``slots``, int64 [T]."""
        for name, given in (("key", key), ("value", value)):
            check_dtype("TreeKVPool.write", name, given, self.dtype)
            if given.shape != (len(slots), self.key_heads, self.width):
                raise ValueError(
                    f"TreeKVPool.write: {name} must be [{len(slots)}, {self.key_heads}, "
                    f"{self.width}] (slots, key heads, width), got {list(given.shape)}"
                )
        kv = self.layer(layer)
        page_T, place_T = slots // self.page, slots % self.page
        kv[page_T, 0, place_T] = key.detach()
        kv[page_T, 1, place_T] = value.detach()

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, G, d] at ``slots``, copied."""
        kv = self.layer(layer)
        page_T, place_T = slots // self.page, slots % self.page
        return kv[page_T, 0, place_T], kv[page_T, 1, place_T]

    # --- facts

    def node(self, node: int) -> PoolNode:
        """What the pool knows of a living node."""
        parent, start, length, children, holds, pins, sealed, evicted, epoch = self.core.node(node)
        return PoolNode(
            parent=parent,
            start=start,
            length=length,
            children=children,
            holds=holds,
            pins=pins,
            is_sealed=sealed,
            is_evicted=evicted,
            epoch=epoch,
        )

    def path(self, node: int) -> list[int]:
        """The nodes from the root to this one."""
        return self.core.path(node)

    def tokens(self, node: int) -> list[int]:
        """Token ids of the node alone."""
        return self.core.tokens(node)

    def path_tokens(self, node: int) -> list[int]:
        """Token ids of the whole path."""
        return [token for one in self.path(node) for token in self.tokens(one)]

    def slots(self, node: int) -> Tensor:
        """int64, slots of the node's own tokens."""
        return self._tensor(self.core.slots(node))

    def path_slots(self, node: int) -> Tensor:
        """int64, slots of all tokens of the path."""
        return torch.cat([self.slots(one) for one in self.path(node)])

    @property
    def stats(self) -> PoolStats:
        """Counts as they are now."""
        used, _, peak, nodes, tokens, evicted_nodes, evicted_tokens = self.core.stats()
        page_bytes = 2 * self.page * self.key_heads * self.width * self.dtype.itemsize
        return PoolStats(
            used_pages=used,
            peak_pages=peak,
            used_bytes=used * page_bytes * len(self._layers),
            nodes=nodes,
            tokens=tokens,
            evicted_nodes=evicted_nodes,
            evicted_tokens=evicted_tokens,
        )

    def check(self) -> None:
        """Raises RuntimeError unless every page has one owner or is free, and all counts match."""
        self.core.check()

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def _grown(self, held: Tensor | None, num_pages: int) -> Tensor:
        # by half at least, so that a long decoding copies each page a few times only
        old = 0 if held is None else held.shape[0]
        size = max(num_pages, old * 3 // 2)
        if self._max_pages is not None:
            size = min(size, self._max_pages)
        if self._layout == "token":
            shape = (size, 2, self.page, self.key_heads, self.width)
            grown = torch.empty(shape, dtype=self.dtype, device=self.device)
        else:
            shape = (size, 2, self.key_heads, self.page, self.width)
            grown = torch.empty(shape, dtype=self.dtype, device=self.device).transpose(2, 3)
        if held is not None:
            grown[:old] = held
        return grown


def _integers(token_ids: Sequence[int] | Tensor) -> list[int]:
    return token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)


@contextlib.contextmanager
def _exhaustion() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TreePoolExhausted(str(error)) from None
