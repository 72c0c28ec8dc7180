"""Keys and values kept between forwards, and how the rows of one forward meet them.

T new rows of a forward, A sequences it holds, n new rows and K keys of a sequence, a sequences with
equally many new rows, Tk keys of all sequences, S slots, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_fast.ops.interval_attention import interval_attention
from dlm_fast.ops.visibility import Visibility

_LEAST_WIDTH = 64
"""heads narrower than this are cheaper to copy than to read where they lie: a tile of the kernel
holds rows of several sequences, and computes all of them"""


class KeyValueStore:
    """Keys and values of every layer in numbered slots, one token each. Who owns which slot is the
    caller's business; the tensors grow with the highest slot in use."""

    def __init__(self) -> None:
        self.num_slots = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, num_slots: int) -> None:
        """Makes slots 0 .. num_slots - 1 usable; their contents are undefined until written."""
        self.num_slots = max(self.num_slots, num_slots)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [S, G, d] after rotary embedding."""
        return self._layers[index]

    def write(self, index: int, slots_T: Tensor, key_TGd: Tensor, value_TGd: Tensor) -> None:
        """Keeps the keys and values of T tokens of one layer."""
        held = self._layers.get(index)
        if held is None or held[0].shape[0] < self.num_slots:
            held = self._grow(held, key_TGd, value_TGd)
            self._layers[index] = held
        held[0].index_copy_(0, slots_T, key_TGd.detach())
        held[1].index_copy_(0, slots_T, value_TGd.detach())

    def copy(self, from_slots: Tensor, to_slots: Tensor) -> None:
        """Copies tokens between slots, in all layers."""
        for index, (key_SGd, value_SGd) in self._layers.items():
            self.write(index, to_slots, key_SGd[from_slots], value_SGd[from_slots])

    def _grow(
        self, held: tuple[Tensor, Tensor] | None, key_TGd: Tensor, value_TGd: Tensor
    ) -> tuple[Tensor, Tensor]:
        # by half at least, so that a long decoding copies each token a few times only
        old = 0 if held is None else held[0].shape[0]
        size = max(self.num_slots, old * 3 // 2)
        grown = (
            key_TGd.new_empty((size, *key_TGd.shape[1:])),
            value_TGd.new_empty((size, *value_TGd.shape[1:])),
        )
        if held is not None:
            for new, kept in zip(grown, held, strict=True):
                new[:old] = kept
        return grown


@dataclass(frozen=True, kw_only=True, eq=False)
class _RowBucket:
    """Sequences with equally many new rows: one attention call."""

    rows: Tensor
    """int64 [a, n], new rows of each sequence"""
    slots: Tensor
    """int64 [a, K], their keys"""
    mask: Tensor | None
    """bool [a, 1, n, K]; None: every row sees every key"""


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedRows:
    """The rows of one forward whose other keys are kept. Stands where a ``Visibility`` stands: new
    rows are consecutive in each sequence, and a row sees its sequence's first ``seen`` keys."""

    store: KeyValueStore
    slots: Tensor
    """int64 [A, K], slot of each token of a sequence from its first on; what lies past its keys is
    any slot that holds numbers"""
    key_lengths: tuple[int, ...]
    """keys of each sequence that this forward sees"""
    row_lengths: tuple[int, ...]
    """new rows of each sequence"""
    position_ids: Tensor
    """int64 [T], position of each new row in its sequence"""
    seen: Tensor
    """int64 [T], how many of its sequence's keys each row sees; never falls inside a sequence"""
    write_rows: Tensor
    """int64, new rows whose keys and values are kept, before they are seen"""
    write_slots: Tensor
    """int64, their slots"""

    @property
    def num_queries(self) -> int:
        return self.position_ids.shape[0]

    @property
    def num_keys(self) -> int:
        return sum(self.key_lengths)

    @cached_property
    def pred(self) -> Tensor:
        """int32 [T], new row of the token before this one; -1 where it is not among them."""
        pred_T = torch.arange(-1, self.num_queries - 1, device=self.position_ids.device)
        first_A = torch.tensor((0, *self.row_lengths[:-1])).cumsum(0)[: len(self.row_lengths)]
        filled = [int(f) for f, n in zip(first_A, self.row_lengths, strict=True) if n]
        pred_T[filled] = -1
        return pred_T.to(torch.int32)

    def to(self, device: torch.device | str) -> CachedRows:
        """Itself: the rows were laid out where the store is."""
        if self.position_ids.device.type != torch.device(device).type:
            raise ValueError(
                f"the cached rows lie on {self.position_ids.device}, the model on {device}; make "
                "them on the model's device"
            )
        return self

    @cached_property
    def visibility(self) -> Visibility:
        """The same pattern over the Tk keys of all sequences in order: the definition."""
        own_AK, lo_AK, hi_AK = self._intervals
        lo, hi = lo_AK[own_AK], hi_AK[own_AK]
        return Visibility(
            intervals=torch.stack([lo, hi, hi, hi], 1).to(torch.int32),
            position_ids=self.position_ids,
            pred=self.pred,
        )

    def attend(
        self,
        layer: int,
        query_HTd: Tensor,
        key_GTd: Tensor,
        value_GTd: Tensor,
        scale: float | None = None,
    ) -> Tensor:
        """[H, T, d]: keeps the new keys and values, then attends. The definition is
        ``interval_attention_ref`` on the keys at ``slots`` under ``visibility``."""
        rows = slice(None) if self.write_rows.numel() == self.num_queries else self.write_rows
        self.store.write(
            layer, self.write_slots, key_GTd.transpose(0, 1)[rows], value_GTd.transpose(0, 1)[rows]
        )
        key_SGd, value_SGd = self.store.layer(layer)
        query_THd = query_HTd.transpose(0, 1)
        if query_HTd.shape[-1] >= _LEAST_WIDTH and self._slot_intervals is not None:
            slots = slice(0, self._slot_intervals.shape[0])
            out_THd = interval_attention(
                query_THd, key_SGd[slots], value_SGd[slots], self._slot_intervals, scale
            )
        else:
            out_THd = self._attend_densely(query_THd, key_SGd, value_SGd, scale)
        return out_THd.transpose(0, 1)

    def _attend_densely(
        self, query_THd: Tensor, key_SGd: Tensor, value_SGd: Tensor, scale: float | None
    ) -> Tensor:
        out_THd = torch.empty_like(query_THd, memory_format=torch.contiguous_format)
        for bucket in self._buckets:
            attended = F.scaled_dot_product_attention(
                _take(query_THd, bucket.rows),
                _take(key_SGd, bucket.slots),
                _take(value_SGd, bucket.slots),
                attn_mask=bucket.mask,
                scale=scale,
                enable_gqa=True,
            )
            out_THd[bucket.rows] = attended.transpose(1, 2)
        return out_THd

    @cached_property
    def _intervals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each [A, K]: whether this is a key of the sequence, and the rows lo <= i < hi that see
        it."""
        device = self.position_ids.device
        row_A = torch.tensor(self.row_lengths, device=device)
        key_A1 = torch.tensor(self.key_lengths, device=device)[:, None]
        member_T = torch.arange(len(row_A), device=device).repeat_interleave(row_A)
        # a row that sees the first ``seen`` keys does not see the others: lo is how many do not
        blind_AK = torch.zeros((*self.slots.shape[:1], self.slots.shape[1] + 1), device=device)
        blind_AK = blind_AK.to(torch.int64)
        blind_AK.index_put_((member_T, self.seen), torch.ones_like(self.seen), accumulate=True)
        end_A1 = row_A.cumsum(0)[:, None]
        lo_AK = end_A1 - row_A[:, None] + blind_AK.cumsum(1)[:, :-1]
        own_AK = torch.arange(self.slots.shape[1], device=device) < key_A1
        return own_AK, lo_AK, end_A1.expand_as(lo_AK)

    @cached_property
    def _slot_intervals(self) -> Tensor | None:
        """int32 [S, 4], who sees what lies in each slot, so that keys are read where they are; None
        where the dense way is taken: on CUDA, whose kernel is compiled for a pattern and this one
        changes at every step, and where rows that share a slot do not lie side by side."""
        if self.position_ids.device.type != "cpu":
            return None
        own_AK, lo_AK, hi_AK = self._intervals
        slot, lo, hi = self.slots[own_AK], lo_AK[own_AK], hi_AK[own_AK]
        size = self.store.num_slots
        first_S = torch.full((size,), self.num_queries).scatter_reduce(0, slot, lo, "amin")
        last_S = torch.zeros(size, dtype=torch.int64).scatter_reduce(0, slot, hi, "amax")
        count_S = torch.zeros(size, dtype=torch.int64).scatter_add(0, slot, hi - lo)
        used_S = count_S > 0
        if not torch.equal(count_S[used_S], (last_S - first_S)[used_S]):
            return None
        first_S = torch.where(used_S, first_S, 0)
        last_S = torch.where(used_S, last_S, 0)
        return torch.stack([first_S, last_S, last_S, last_S], 1).to(torch.int32)

    @cached_property
    def _buckets(self) -> tuple[_RowBucket, ...]:
        by_length: dict[int, list[int]] = {}
        for member, length in enumerate(self.row_lengths):
            if length:
                by_length.setdefault(length, []).append(member)
        device = self.position_ids.device
        first_A = torch.tensor((0, *self.row_lengths)).cumsum(0)
        buckets = []
        for length, members in by_length.items():
            rows_an = first_A[members][:, None] + torch.arange(length)
            rows_an = rows_an.to(device)
            num_keys = max(self.key_lengths[m] for m in members)
            key_K = torch.arange(num_keys, device=device)
            mask = (key_K < self.seen[rows_an][..., None])[:, None]
            # any slot past the keys of a sequence may be empty, and NaN outlives a mask
            own_aK = (
                key_K < torch.tensor([self.key_lengths[m] for m in members], device=device)[:, None]
            )
            slots_aK = self.slots[torch.tensor(members, device=device), :num_keys]
            slots_aK = torch.where(own_aK, slots_aK, slots_aK[:, :1])
            all_seen = bool(mask.all())
            buckets.append(
                _RowBucket(rows=rows_an, slots=slots_aK, mask=None if all_seen else mask)
            )
        return tuple(buckets)


def _take(x_SGd: Tensor, index_aK: Tensor) -> Tensor:
    """[a, G, K, d]. On a CPU this copies whole tokens, sixteen times as fast as an index does."""
    taken = x_SGd.index_select(0, index_aK.flatten())
    return taken.view(*index_aK.shape, *x_SGd.shape[1:]).transpose(1, 2)
