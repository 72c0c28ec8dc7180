"""Attention under intervals by FlexAttention, with the tiles that are not empty listed from them.

Tq query rows, Tk key rows, M query tiles, N key tiles, H query heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary

TILE = 128
"""query rows and keys of a tile: FlexAttention's own default"""


def flex_interval_attention(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, intervals_T4: Tensor, scale: float
) -> Tensor:
    """[Tq, H, d]. On CUDA compiled; on the CPU plain, forward only: for tests."""
    if 0 in (q_THd.shape[0], k_TGd.shape[0]):
        # no key gives zeros; the sums keep the graph
        return q_THd * 0 + (k_TGd.sum() + v_TGd.sum()) * 0
    plain: Any = flex_attention
    attend = _compiled() if q_THd.is_cuda else plain
    out_1HTd: Tensor = attend(
        *(x.transpose(0, 1)[None] for x in (q_THd, k_TGd, v_TGd)),
        block_mask=block_mask_of(intervals_T4, q_THd.shape[0]),
        scale=scale,
        enable_gqa=q_THd.shape[1] != k_TGd.shape[1],
    )
    return out_1HTd[0].transpose(0, 1)


def block_mask_of(intervals_T4: Tensor, num_queries: int) -> BlockMask:
    """Kept with the intervals: the layers of a model ask for the same one."""
    key = (num_queries, intervals_T4._version)
    kept = _block_masks.get(intervals_T4)
    if kept is None or kept[0] != key:
        kept = _block_masks[intervals_T4] = (key, _block_mask(intervals_T4, num_queries))
    return kept[1]


_block_masks: Any = WeakIdKeyDictionary()


@functools.cache
def _compiled() -> Callable[..., Any]:
    # packs differ in length with every call; one kernel must serve them
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(intervals_T4: Tensor, num_queries: int) -> BlockMask:
    seen_MN, full_MN = tiles_of(intervals_T4, num_queries)
    lo0, hi0, lo1, hi1 = intervals_T4.clone().unbind(1)

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        first = (lo0[key] <= row) & (row < hi0[key])
        return first | ((lo1[key] <= row) & (row < hi1[key]))

    return BlockMask.from_kv_blocks(
        *_listed(seen_MN & ~full_MN),
        *_listed(full_MN),
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(num_queries, intervals_T4.shape[0]),
    )


def tiles_of(intervals_T4: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """bool [M, N] each: some row of the query tile may see a key of the tile; all rows see all."""
    missing = -intervals_T4.shape[0] % TILE
    padded_T4 = torch.nn.functional.pad(intervals_T4, (0, 0, 0, missing))
    lo, hi = padded_T4.view(-1, TILE, 2, 2).unbind(-1)  # [N, TILE, 2]
    empty = lo >= hi
    lowest, highest = lo.masked_fill(empty, num_queries).amin(1), hi.masked_fill(empty, 0).amax(1)
    first_M11 = torch.arange(0, num_queries, TILE, device=intervals_T4.device)[:, None, None]
    end_M11 = first_M11 + TILE
    seen_MN = ((lowest < end_M11) & (highest > first_M11)).any(-1)
    # a padded key is seen by nobody and no row lies past the last: such tiles are never full
    full_MN = ((lo.amax(1) <= first_M11) & (hi.amin(1) >= end_M11)).any(-1)
    return seen_MN, full_MN


def _listed(tile_MN: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles a row of tiles has, and which ones: those first."""
    order = tile_MN.int().argsort(dim=1, descending=True, stable=True)
    return tile_MN.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
