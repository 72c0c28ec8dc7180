"""One forward of the denoising loop without a cache, and what any way of doing it offers.

Letters: ``A`` rows of one forward, ``T`` packed tokens of it, ``N`` positions with statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dlm_fast.ops import TokenStats
from dlm_fast.ops.visibility import Visibility
from dlm_fast.rollout.window import Windows

Forward = Callable[..., TokenStats]


class Network(Protocol):
    """Which rows go into the next forward, and the forward."""

    def choose(self) -> Tensor:
        """int64 [A], live rows of the next forward in ascending order; empty when none is left."""
        ...

    def statistics(self, row_A: Tensor, row_N: Tensor, column_N: Tensor, **draw: Any) -> TokenStats:
        """Drawn tokens and their statistics at window columns ``column_N`` of rows ``row_N``
        (counted in ``row_A``); ``draw`` goes to the forward as it is."""
        ...

    def leave(self, rows: list[int]) -> None:
        """These rows are finished."""
        ...


class Recompute:
    """Everything a row's current block can see goes through the network at every step."""

    def __init__(
        self, policy: Any, forward: Forward, windows: Windows, max_batch: int | None
    ) -> None:
        self._policy, self._forward, self._windows = policy, forward, windows
        self._max_batch = max_batch
        self._on_grid = policy.family.kind == "block"
        self._layout: _Layout | None = None

    def choose(self) -> Tensor:
        return self._windows.live_R.nonzero()[: self._max_batch, 0]

    def leave(self, rows: list[int]) -> None:
        pass

    def statistics(self, row_A: Tensor, row_N: Tensor, column_N: Tensor, **draw: Any) -> TokenStats:
        layout = self._lay_out(row_A)
        rows_N = (layout.window_A[row_N] + column_N).to(torch.int32)
        return self._forward(
            self._windows.ids_F[layout.source_T],
            layout.visibility,
            rows=self._policy.predicting_rows(rows_N, layout.visibility),
            **draw,
        )

    def _lay_out(self, row_A: Tensor) -> _Layout:
        length_A = self._windows.visible_length(row_A)
        layout = self._layout
        if not (
            layout is not None
            and torch.equal(layout.row_A, row_A)
            and torch.equal(layout.length_A, length_A)
        ):
            layout = self._layout = _lay_out(self._windows, row_A, length_A, self._on_grid)
        return layout


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How the live rows are packed; reused until rows leave or their visible lengths change."""

    row_A: Tensor
    length_A: Tensor
    visibility: Visibility
    source_T: Tensor
    """int64, place of each packed token in the windows' flat ids"""
    window_A: Tensor
    """int64, packed place of each row's first window token"""


def _lay_out(windows: Windows, row_A: Tensor, length_A: Tensor, on_grid: bool) -> _Layout:
    lengths = tuple(length_A.tolist())
    if on_grid:
        visibility = Visibility.block_causal(lengths, windows.block_size)
    else:
        visibility = Visibility.full(lengths)
    begin_A = length_A.cumsum(0) - length_A
    shift_T = (windows.begin_R[row_A] - begin_A).repeat_interleave(length_A)
    source_T = torch.arange(shift_T.numel(), device=row_A.device) + shift_T
    return _Layout(
        row_A=row_A,
        length_A=length_A,
        visibility=visibility.to(windows.device),
        source_T=source_T,
        window_A=begin_A + windows.prompt_R[row_A],
    )
