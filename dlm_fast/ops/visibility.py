"""Which query row of a pack sees which key row: two half-open query intervals per key.

Row i sees key j iff lo0[j] <= i < hi0[j] or lo1[j] <= i < hi1[j]. The dense [Tq, Tk] matrix is a
definition for tests and references; nothing here keeps it.

Tq query rows, Tk key rows, S length of a segment, b segments of one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dlm_fast.ops.trace_pack import TraceNode


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentBucket:
    """Segments of equal length, which one batched attention call can take together."""

    length: int
    """S, rows of each segment"""
    members: tuple[int, ...]
    """which segments of the pack, in order"""
    mask: Tensor | None
    """bool [S, S] if all members look alike, else [b, 1, S, S]; None: every row sees every key"""
    is_causal: bool
    """the mask is the lower triangle"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Visibility:
    """Attention pattern, positions and predecessors of the rows of one pack."""

    intervals: Tensor
    """int32 [Tk, 4]: lo0, hi0, lo1, hi1 of each key; an empty interval has lo = hi"""
    position_ids: Tensor
    """int64 [Tq], position of each row in its own sequence (rotary embedding)"""
    pred: Tensor
    """int32 [Tq], packed row of the token before this one in its sequence; -1 for the first"""
    lengths: tuple[int, ...] = ()
    """rows of consecutive segments that attention never crosses; (): one pattern over all rows"""

    def __post_init__(self) -> None:
        _check_types(self)
        if (
            self.intervals.device.type == "cpu"
        ):  # reading values elsewhere would wait for the device
            _check_values(self)

    @property
    def num_queries(self) -> int:
        return self.position_ids.shape[0]

    @property
    def num_keys(self) -> int:
        return self.intervals.shape[0]

    @staticmethod
    def full(lengths: Sequence[int]) -> Visibility:
        """Every token sees all tokens of its own sequence."""
        first, last, _ = _segment_bounds(lengths)
        return _packed(lengths, first, last)

    @staticmethod
    def causal(lengths: Sequence[int]) -> Visibility:
        """Every token sees itself and the tokens before it in its own sequence."""
        first, last, offset = _segment_bounds(lengths)
        return _packed(lengths, first + offset, last)

    @staticmethod
    def block_causal(lengths: Sequence[int], block_size: int) -> Visibility:
        """Every token sees its own block, on a grid from position 0, and the blocks before it."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        first, last, offset = _segment_bounds(lengths)
        return _packed(lengths, first + offset // block_size * block_size, last)

    @staticmethod
    def tree(parents: Sequence[int], lengths: Sequence[int]) -> Visibility:
        """Every token sees itself and the tokens before it on its path from the root.

        Nodes in depth-first order: ``parents[n]`` is the node that n continues, -1 for a root, and
        the descendants of a node follow it at once. ``lengths`` are their tokens, 0 or more.
        Source: tree packing of TreePO, arXiv 2508.17445.
        """
        rows = _tree_rows(parents, lengths)
        row = torch.arange(len(rows.end))
        end = torch.tensor(rows.end, dtype=torch.int64)
        return Visibility(
            intervals=torch.stack([row, end, end, end], dim=1).to(torch.int32),
            position_ids=torch.tensor(rows.position, dtype=torch.int64),
            pred=torch.tensor(rows.pred, dtype=torch.int32),
            lengths=rows.tree_lengths,
        )

    @staticmethod
    def trace(nodes: Sequence[TraceNode], *, block_size: int, **options: Any) -> Visibility:
        """Of the rows that ``ops.trace_pack`` makes of recorded block-diffusion rollouts: finished
        tokens see their blocks and those before, each block's states the blocks before and
        themselves. ``options`` as there; one construction for chains, groups and trees."""
        from dlm_fast.ops.trace_pack import trace_pack  # which is built on this module

        return trace_pack(nodes, block_size=block_size, mask_id=0, **options).visibility

    def dense(self) -> Tensor:
        """bool [Tq, Tk], True where the row sees the key."""
        return dense_mask(self.intervals, self.num_queries)

    def to(self, device: torch.device | str) -> Visibility:
        """The same pattern on another device."""
        if self.intervals.device == torch.device(device):
            return self
        return Visibility(
            intervals=self.intervals.to(device),
            position_ids=self.position_ids.to(device),
            pred=self.pred.to(device),
            lengths=self.lengths,
        )

    @cached_property
    def buckets(self) -> tuple[SegmentBucket, ...]:
        """The segments by length; () if the pattern has no segments."""
        intervals = self.intervals.cpu()
        by_length: dict[int, list[int]] = {}
        for member, length in enumerate(self.lengths):
            if length:
                by_length.setdefault(length, []).append(member)
        starts = torch.tensor((0, *self.lengths)).cumsum(0)
        return tuple(
            _bucket(intervals, starts, length, members, self.intervals.device)
            for length, members in by_length.items()
        )


def dense_mask(intervals: Tensor, num_queries: int) -> Tensor:
    """bool [..., Tq, Tk] of intervals [..., Tk, 4]: the definition."""
    row = torch.arange(num_queries, device=intervals.device)[:, None]
    lo0, hi0, lo1, hi1 = intervals[..., None, :, :].unbind(-1)
    return ((lo0 <= row) & (row < hi0)) | ((lo1 <= row) & (row < hi1))


@dataclass(frozen=True, kw_only=True)
class _TreeRows:
    """Numbers of each packed row of some trees."""

    end: list[int]
    """row behind the subtree of its node"""
    position: list[int]
    """tokens of its path before it"""
    pred: list[int]
    """row of the token before it, -1: none"""
    tree_lengths: tuple[int, ...]
    """rows of each tree"""


def _tree_rows(parents: Sequence[int], lengths: Sequence[int]) -> _TreeRows:
    if len(parents) != len(lengths):
        raise ValueError(f"{len(parents)} parents for {len(lengths)} lengths; give one of each")
    last: list[int] = []  # last row of each node's path, -1: none
    start: list[int] = []  # tokens of each node's path before it
    end_of_node = [0] * len(parents)
    position: list[int] = []
    pred: list[int] = []
    tree_lengths: list[int] = []
    path: list[int] = []
    for node, (parent, length) in enumerate(zip(parents, lengths, strict=True)):
        if length < 0:
            raise ValueError(f"lengths must not be negative, got {length} for node {node}")
        row = len(position)
        while path and path[-1] != parent:
            end_of_node[path.pop()] = row
        if not path and parent != -1:
            raise ValueError(
                f"parents[{node}] = {parent} is not on the path to node {node - 1}: nodes must be "
                "in depth-first order, descendants right behind their node, and -1 for roots"
            )
        path.append(node)
        start.append(0 if parent < 0 else start[parent] + lengths[parent])
        before = -1 if parent < 0 else last[parent]
        last.append(row + length - 1 if length else before)
        position += range(start[node], start[node] + length)
        pred += [before, *range(row, row + length - 1)][:length]
        if parent < 0:
            tree_lengths.append(0)
        tree_lengths[-1] += length
    for node in path:
        end_of_node[node] = len(position)
    end = [e for e, length in zip(end_of_node, lengths, strict=True) for _ in range(length)]
    return _TreeRows(end=end, position=position, pred=pred, tree_lengths=tuple(tree_lengths))


def _segment_bounds(lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: first row of its segment, end of its segment, offset in its segment."""
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths must not be negative, got {list(lengths)}")
    length = torch.tensor(list(lengths), dtype=torch.int64)
    end = length.cumsum(0)
    first = torch.repeat_interleave(end - length, length)
    return first, torch.repeat_interleave(end, length), torch.arange(first.numel()) - first


def _packed(lengths: Sequence[int], lo: Tensor, hi: Tensor) -> Visibility:
    _, _, offset = _segment_bounds(lengths)
    pred = torch.arange(offset.numel()) - 1
    return Visibility(
        intervals=torch.stack([lo, hi, hi, hi], dim=1).to(torch.int32),
        position_ids=offset,
        pred=pred.masked_fill(offset == 0, -1).to(torch.int32),
        lengths=tuple(int(length) for length in lengths),
    )


def _bucket(
    intervals: Tensor, starts: Tensor, length: int, members: list[int], device: torch.device
) -> SegmentBucket:
    first_b1 = starts[members][:, None]
    rows_bS = first_b1 + torch.arange(length)
    relative = intervals[rows_bS] - first_b1[..., None]
    lo, hi = relative[..., ::2], relative[..., 1::2]
    relative = relative * (lo < hi).repeat_interleave(2, -1)  # every empty interval as (0, 0)
    if bool((relative == relative[:1]).all()):
        mask = dense_mask(relative[0], length)
    else:
        mask = dense_mask(relative, length)[:, None]
    is_causal = mask.dim() == 2 and length > 1 and torch.equal(mask, torch.ones_like(mask).tril())
    return SegmentBucket(
        length=length,
        members=tuple(members),
        mask=None if bool(mask.all()) else mask.to(device),
        is_causal=is_causal,
    )


def _check_types(visibility: Visibility) -> None:
    intervals, position_ids, pred = visibility.intervals, visibility.position_ids, visibility.pred
    if intervals.dtype != torch.int32 or intervals.dim() != 2 or intervals.shape[1] != 4:
        raise ValueError(
            f"visibility.intervals must be int32 [keys, 4], got {intervals.dtype} "
            f"{list(intervals.shape)}"
        )
    if position_ids.dtype != torch.int64 or position_ids.dim() != 1:
        raise ValueError(
            f"visibility.position_ids must be int64 [rows], got {position_ids.dtype} "
            f"{list(position_ids.shape)}"
        )
    if pred.dtype != torch.int32 or pred.shape != position_ids.shape:
        raise ValueError(
            f"visibility.pred must be int32 [{position_ids.shape[0]}] like position_ids, got "
            f"{pred.dtype} {list(pred.shape)}"
        )
    rows = {position_ids.shape[0], intervals.shape[0]}
    if visibility.lengths and rows != {sum(visibility.lengths)}:
        raise ValueError(
            f"visibility.lengths add up to {sum(visibility.lengths)}, but there are "
            f"{position_ids.shape[0]} query rows and {intervals.shape[0]} key rows"
        )


def _check_values(visibility: Visibility) -> None:
    lo0, hi0, lo1, hi1 = visibility.intervals.unbind(1)
    num_queries = visibility.num_queries
    wrong = (torch.minimum(lo0, lo1) < 0) | (torch.maximum(hi0, hi1) > num_queries)
    wrong |= (lo0 > hi0) | (lo1 > hi1)
    # a kernel that walks both intervals would count the rows of an overlap twice
    wrong |= torch.maximum(lo0, lo1) < torch.minimum(hi0, hi1)
    _refuse(
        wrong,
        visibility,
        f"must be two disjoint intervals 0 <= lo <= hi <= {num_queries} query rows",
    )
    if visibility.lengths:
        first, last, _ = _segment_bounds(visibility.lengths)
        outside = (lo0 < hi0) & ((lo0 < first) | (hi0 > last))
        outside |= (lo1 < hi1) & ((lo1 < first) | (hi1 > last))
        _refuse(outside, visibility, "reaches rows outside the key's segment; leave lengths empty")
    wrong_pred = (visibility.pred < -1) | (visibility.pred >= num_queries)
    if bool(wrong_pred.any()):
        row = int(wrong_pred.nonzero()[0])
        raise ValueError(
            f"visibility.pred[{row}] = {int(visibility.pred[row])} is no row of the pack and not -1"
        )


def _refuse(wrong: Tensor, visibility: Visibility, what: str) -> None:
    if bool(wrong.any()):
        key = int(wrong.nonzero()[0])
        raise ValueError(
            f"visibility.intervals[{key}] = {visibility.intervals[key].tolist()} {what}"
        )
