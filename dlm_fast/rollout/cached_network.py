"""The forward of the denoising loop with kept keys and values: block, prefix and dual caches.

A forward takes a stretch of each row through the network; all other tokens are seen as kept keys.
The caches differ in the stretch alone:

    block    what is not kept yet up to the end of the current block: at the block's first step the
             finished block before it and the block itself, then the block (exact)
    prefix   the block's first step: everything. Then from the block's first token on (approximate)
    dual     the block's first step: everything. Then the block, its keys replaced in place
             (approximate)

Letters: ``A`` rows of one forward, ``R`` rows of the call, ``T`` packed new tokens, ``N`` positions
with statistics, ``Q`` pages of a row.
Sources: block caches of SDAR (arXiv 2510.06303); prefix and dual caches of Fast-dLLM
(arXiv 2505.22618).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.models.kv_cache import CachedRows, KeyValueStore
from dlm_fast.ops import TokenStats
from dlm_fast.rollout.admission import Admission, RowSize
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.pages import Pages
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.window import Windows


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stretch:
    """The part of each row that goes through the network: positions of its sequence, each [A]."""

    row: Tensor
    """rows of the call"""
    first: Tensor
    """first new token"""
    stop: Tensor
    """end of the new tokens"""
    keys: Tensor
    """end of the tokens that are seen"""
    write: Tensor
    """keys and values are written from here on"""

    def same_as(self, other: _Stretch) -> bool:
        return all(
            torch.equal(getattr(self, name), getattr(other, name))
            for name in ("row", "first", "stop", "keys", "write")
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layout:
    """A stretch of each row as one pack; reused until a stretch changes."""

    stretch: _Stretch
    cached: CachedRows
    source_T: Tensor
    """int64, place of each new token in the windows' flat ids"""
    begin_A: Tensor
    """int64, packed place of each row's first new token"""


class CachedNetwork:
    """Forwards over the new tokens of the rows inside; their pages are counted exactly."""

    def __init__(
        self,
        policy: Any,
        forward: Forward,
        windows: Windows,
        config: SamplerConfig,
        max_batch: int | None,
    ) -> None:
        self._policy, self._forward, self._windows, self._config = policy, forward, windows, config
        self._is_block = config.cache == "block"
        self._shift = policy.family.logit_shift
        self._store = KeyValueStore()
        self.pages = Pages(config.cache_page or config.block_size, config.cache_pages)
        length_R = windows.prompt_R + windows.width
        # all of a prompt's whole blocks look at nothing behind them, so their keys are the same in
        # every row of the prompt
        shared_R = (
            windows.prompt_R // config.block_size * config.block_size
            if self._is_block
            else torch.zeros_like(length_R)
        )
        sizes = [
            RowSize(shared_key=self._key(row, shared), shared_length=shared, longest=longest)
            for row, (shared, longest) in enumerate(
                zip(shared_R.tolist(), length_R.tolist(), strict=True)
            )
        ]
        self._sizes = sizes
        live = windows.live_R.nonzero()[:, 0].tolist()
        self.admission = Admission(self.pages, sizes, live, max_batch)
        self._kept_R = shared_R
        """tokens of each row whose final keys are kept"""
        most_pages = self.pages.needed(int(length_R.max()))
        self._page_RQ = torch.zeros(
            (len(sizes), most_pages), dtype=torch.int64, device=windows.device
        )
        self._layout: _Layout | None = None

    def choose(self) -> Tensor:
        entered = self.admission.enter()
        if entered:
            self._set_pages({e.row: self.admission.page_lists[e.row] for e in entered}, {})
            filling = [e.row for e in entered if e.fills_shared]
            if filling:
                self._fill_prompts(filling)
            self._copy_pages([(e.copy_from, e.copy_to) for e in entered if e.copy_to is not None])
        return torch.tensor(self.admission.inside, dtype=torch.int64, device=self._windows.device)

    def leave(self, rows: list[int]) -> None:
        for row in rows:
            if row in self.admission.page_lists:  # hints may finish a row before it ever enters
                self.admission.leave(row)
        self._layout = None

    def statistics(self, row_A: Tensor, row_N: Tensor, column_N: Tensor, **draw: Any) -> TokenStats:
        start_A, end_A = self._windows.block_bounds(row_A)
        if self._is_block:
            self._grow(row_A, end_A)
            if not self._config.fused_commit:
                self._commit(row_A, start_A)
            stretch = self._stretch(row_A, self._kept_R[row_A], end_A, end_A)
        else:
            self._grow(row_A, self._windows.prompt_R[row_A] + self._windows.width)
            stretch = self._approximate(row_A, start_A, end_A)
        layout = self._lay_out(stretch)
        position_N = self._windows.prompt_R[row_A[row_N]] + column_N
        rows_N = layout.begin_A[row_N] + position_N - stretch.first[row_N]
        stats = self._run(layout, self._predicting(rows_N, layout), **draw)
        self._kept_R[row_A] = start_A
        return stats

    def _approximate(self, row_A: Tensor, start_A: Tensor, end_A: Tensor) -> _Stretch:
        windows, config = self._windows, self._config
        length_A = windows.prompt_R[row_A] + windows.width
        stop_A, keys_A = length_A, length_A
        if config.cache == "dual":
            stop_A = end_A
        elif config.prefix_horizon is not None:
            stop_A = keys_A = (end_A + config.prefix_horizon).minimum(length_A)
        is_first_A = windows.block_step_R[row_A] == 0
        write_A = torch.where(is_first_A, 0, start_A)
        return self._stretch(
            row_A,
            write_A,
            torch.where(is_first_A, length_A, stop_A),
            torch.where(is_first_A, length_A, keys_A),
        )

    def _stretch(self, row_A: Tensor, write_A: Tensor, stop_A: Tensor, keys_A: Tensor) -> _Stretch:
        """With a logit shift the token before the new ones goes through once more, to predict."""
        first_A = (write_A - self._shift).clamp(min=0)
        return _Stretch(row=row_A, first=first_A, stop=stop_A, keys=keys_A, write=write_A)

    def _commit(self, row_A: Tensor, start_A: Tensor) -> None:
        """Keys of the finished blocks by a forward of their own."""
        behind_A = self._kept_R[row_A] < start_A
        if bool(behind_A.any()):
            row_C, start_C = row_A[behind_A], start_A[behind_A]
            self._keep(row_C, self._kept_R[row_C], start_C)
            self._kept_R[row_C] = start_C

    def _keep(self, row_A: Tensor, first_A: Tensor, stop_A: Tensor) -> None:
        stretch = _Stretch(row=row_A, first=first_A, stop=stop_A, keys=stop_A, write=first_A)
        none = torch.empty(0, dtype=torch.int32, device=row_A.device)
        self._run(self._lay_out(stretch), none, temperature=0.0)

    def _run(self, layout: _Layout, rows_N: Tensor, **draw: Any) -> TokenStats:
        ids_T = self._windows.ids_F[layout.source_T]
        return self._forward(ids_T, layout.cached, rows=rows_N, **draw)

    def _predicting(self, rows_N: Tensor, layout: _Layout) -> Tensor:
        return self._policy.predicting_rows(rows_N.to(torch.int32), layout.cached)

    def _lay_out(self, stretch: _Stretch) -> _Layout:
        if self._layout is not None and stretch.same_as(self._layout.stretch):
            return self._layout
        windows = self._windows
        count_A = stretch.stop - stretch.first
        begin_A = count_A.cumsum(0) - count_A
        row_lengths = tuple(count_A.tolist())
        member_T = torch.arange(len(row_lengths), device=windows.device).repeat_interleave(count_A)
        row_T = stretch.row[member_T]
        packed_T = torch.arange(member_T.numel(), device=windows.device)
        position_T = packed_T + (stretch.first - begin_A)[member_T]
        seen_T = stretch.keys[member_T]
        if self._is_block:
            size = self._config.block_size
            seen_T = ((position_T // size + 1) * size).minimum(seen_T)
        key_lengths = tuple(stretch.keys.tolist())
        key_K = torch.arange(max(key_lengths), device=windows.device)
        written = (position_T >= stretch.write[member_T]).nonzero()[:, 0]
        cached = CachedRows(
            store=self._store,
            slots=self._slots(stretch.row[:, None], key_K),
            key_lengths=key_lengths,
            row_lengths=row_lengths,
            position_ids=position_T,
            seen=seen_T,
            write_rows=written,
            write_slots=self._slots(row_T[written], position_T[written]),
        )
        self._layout = _Layout(
            stretch=stretch,
            cached=cached,
            source_T=windows.begin_R[row_T] + position_T,
            begin_A=begin_A,
        )
        return self._layout

    def _slots(self, row: Tensor, position: Tensor) -> Tensor:
        size = self.pages.page_size
        return self._page_RQ[row, position // size] * size + position % size

    def _grow(self, row_A: Tensor, length_A: Tensor) -> None:
        new, held = {}, {}
        for row, length in zip(row_A.tolist(), length_A.tolist(), strict=True):
            count = len(self.admission.page_lists[row])
            if self.pages.needed(length) > count:
                new[row], held[row] = self.admission.grow(row, length), count
        if new:
            self._set_pages(new, held)

    def _set_pages(self, pages_of: dict[int, list[int]], held: dict[int, int]) -> None:
        """Writes new pages of rows behind those they ``held``."""
        places = [
            (row, held.get(row, 0) + i, page)
            for row, pages in pages_of.items()
            for i, page in enumerate(pages)
        ]
        self._store.reserve(self.pages.made * self.pages.page_size)
        if places:
            row, place, page = torch.tensor(places, device=self._windows.device).unbind(1)
            self._page_RQ[row, place] = page

    def _fill_prompts(self, rows: list[int]) -> None:
        """Keys of shared prompts, each once, into the pages that their rows share."""
        own = {row: self.admission.page_lists[row] for row in rows}
        shared = {row: self.admission.shared_pages(row) for row in rows}
        self._set_pages(shared, {})
        row_A = torch.tensor(rows, device=self._windows.device)
        self._keep(row_A, torch.zeros_like(row_A), self._kept_R[row_A])
        self._layout = None
        self._set_pages(own, {})

    def _copy_pages(self, pairs: list[tuple[int | None, int | None]]) -> None:
        if not pairs:
            return
        size = self.pages.page_size
        page_C2 = torch.tensor(pairs, device=self._windows.device)
        slots_2S = (
            (page_C2[..., None] * size + torch.arange(size, device=page_C2.device))
            .transpose(0, 1)
            .flatten(1)
        )
        self._store.copy(slots_2S[0], slots_2S[1])

    def _key(self, row: int, shared: int) -> Hashable:
        begin = int(self._windows.begin_R[row])
        return tuple(self._windows.ids_F[begin : begin + shared].tolist()) if shared else row
