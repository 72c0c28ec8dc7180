"""The nodes of growing trees in a pool of keys: opened, pinned, cut, given back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dlm_fast.ops import Refill, TreeKVPool
from dlm_fast.rollout.path_nodes import PathNode

PAGE = 16
"""tokens of a page where rollout.cache_page leaves it open"""


class PoolKeeper:
    """One pool node per node of a tree. Finished paths may lose their pages when there are no free
    ones, and are computed again if they are continued."""

    pool: TreeKVPool

    @property
    def pages_peak(self) -> int:
        """Most pages in use at once so far."""
        return self.pool.stats.peak_pages

    def finish(self, node: PathNode) -> None:
        """Its pages may be taken, until it or a child of it draws again."""
        if node.is_pinned:
            self.pool.unpin(node.handle)
            node.is_pinned = False

    def split(self, node: PathNode, count: int) -> PathNode:
        """``PathNode.split`` with the node of the pool."""
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
            upper_handle = self.pool.split(handle, self._lead(node) + count)
            self.pool.hold(upper_handle)
            upper = node.split(count)
            upper.handle = upper_handle
        return upper

    def forget(self, nodes: Sequence[PathNode]) -> None:
        """Nothing of these nodes is needed any more; parents before their children."""
        for node in reversed(nodes):
            if node.handle >= 0:
                self.pool.release(node.handle)
                node.handle, node.is_pinned, node.kept = -1, False, 0

    def _lead(self, node: PathNode) -> int:
        """Tokens in the pool's node before the node's own."""
        return 0

    def _fill(self, node: PathNode, refill: Refill) -> None:
        """Computes keys that were evicted, at the end of the node's path."""
        raise NotImplementedError

    def _open(self, node: PathNode) -> None:
        """The node has a place in the pool, its path is computed and stays."""
        parent = node.parent
        if node.handle >= 0:
            self._pin(node)
        elif parent is None:
            node.handle, node.is_pinned = self.pool.alloc(), True
        else:
            self._pin(parent)
            node.handle, node.is_pinned = self.pool.fork(parent.handle)[0], True
            self.finish(parent)  # its child keeps its pages from now on

    def _pin(self, node: PathNode) -> None:
        if node.is_pinned:
            return
        refill = self.pool.pin([node.handle])
        node.is_pinned = True
        if refill.token_ids.numel():
            self._fill(node, refill)


def pool_for(policy: Any, page: int, max_pages: int | None) -> TreeKVPool:
    """A pool for the keys of a policy, in the type its attention computes in. ``page`` 0: 16."""
    config, device = policy.config, policy.device
    heads = config.num_attention_heads
    dtype = policy.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return TreeKVPool(
        num_layers=config.num_hidden_layers,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        page=page or PAGE,
        max_pages=max_pages,
        dtype=dtype,
        device=device,
    )
