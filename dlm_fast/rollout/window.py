"""The state of all response windows of one call: tokens, masks, block pointers, schedule, record.

Letters: ``R`` rows (sequences), ``W`` positions of the window, ``A`` rows of one forward, ``N``
revealed positions, ``F`` tokens of all sequences one after the other (prompt, window, prompt,
window, ...). Every row has its own block pointer, so no row waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlm_fast.rollout.sampler_config import SamplerConfig


class Windows:
    """Tensors of R windows. No row looks at another: its course is the same in any batch."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        config: SamplerConfig,
        *,
        mask_id: int,
        eos_ids: Sequence[int],
        on_grid: bool,
        look_ahead: bool = False,
        fixed_RW: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``on_grid``: blocks lie on the grid from position 0 of the sequence (block models); else
        they begin where the prompt ends. ``look_ahead``: later blocks are wanted in the forward
        even where they cannot reach the current one. ``fixed_RW``: given tokens, the mask id where
        free."""
        num_rows, width = len(prompts), config.max_new_tokens
        every_R = torch.arange(num_rows, device=device)
        self.mask_id, self.width, self.block_size = mask_id, width, config.block_size
        self.device = torch.device(device)
        self.prompt_R = torch.tensor([p.numel() for p in prompts], device=device)
        self.begin_R = torch.cumsum(self.prompt_R + width, 0) - width - self.prompt_R
        self.first_R = self.begin_R + self.prompt_R
        free_W = torch.full((width,), mask_id)
        self.ids_F = torch.cat([part for p in prompts for part in (p, free_W)]).to(device)
        if fixed_RW is not None:
            self.ids_F[self._flat(every_R)] = fixed_RW.to(device)

        self.pending_RW = self.ids_F[self._flat(every_R)] == mask_id
        """masked positions that some step will still reveal"""
        phase_R = self.prompt_R % config.block_size if on_grid else torch.zeros_like(self.prompt_R)
        self.block_RW = (phase_R[:, None] + torch.arange(width, device=device)) // config.block_size
        self.phase_R, self.cut_ahead = phase_R, on_grid and not look_ahead
        self.steps_RK = share_steps(phase_R, config)
        self.eos_ids = torch.tensor(list(eos_ids), device=device)
        self.early_stop = config.early_stop and len(eos_ids) > 0
        self.stop_at_eos = config.stop_at_eos and len(eos_ids) > 0
        self.response_R = torch.full_like(self.prompt_R, width)
        """columns of each row's response"""
        self.decoded_R = torch.full_like(self.prompt_R, width)
        """columns that are decoded, or will be"""

        self.pointer_R = torch.full_like(self.prompt_R, -1)
        self.live_R = torch.ones_like(self.prompt_R, dtype=torch.bool)
        self.step_R = torch.zeros_like(self.prompt_R, dtype=torch.int32)
        self.block_step_R = torch.zeros_like(self.step_R)
        self.block_count_R = torch.zeros_like(self.prompt_R)
        self.step_map_RW = torch.zeros((num_rows, width), dtype=torch.int32, device=device)
        self.logprob_RW = torch.zeros((num_rows, width), dtype=torch.float32, device=device)
        self.confidence_RW = torch.zeros_like(self.logprob_RW)
        self._open_blocks(every_R)

    def _flat(self, row_A: Tensor) -> Tensor:
        """[A, W] places of the windows of these rows in ``ids_F``."""
        return self.first_R[row_A][:, None] + torch.arange(self.width, device=row_A.device)

    def ids_of(self, row_A: Tensor) -> Tensor:
        """[A, W], the windows of these rows."""
        return self.ids_F[self._flat(row_A)]

    def quota(self, row_A: Tensor) -> Tensor:
        """int32 [A], reveals due now: the block's masked count shared out evenly over its steps,
        the first steps take the remainder. At least 1: with fewer tokens than steps a block ends
        early instead of running steps that reveal nothing."""
        steps_A = self.steps_RK[row_A, self.pointer_R[row_A]]
        count_A = self.block_count_R[row_A]
        more_A = self.block_step_R[row_A] < count_A % steps_A
        return (count_A // steps_A + more_A).clamp(min=1).to(torch.int32)

    def visible_length(self, row_A: Tensor) -> Tensor:
        """Tokens of each sequence that the network has to see: a block model's later blocks cannot
        reach the current one, so they are left out."""
        end_A = torch.full_like(row_A, self.width)
        if self.cut_ahead:
            end_A = ((self.pointer_R[row_A] + 1) * self.block_size - self.phase_R[row_A]).clamp(
                max=self.width
            )
        return self.prompt_R[row_A] + end_A

    def block_bounds(self, row_A: Tensor) -> tuple[Tensor, Tensor]:
        """First position and end of each row's current block, counted in its sequence; tokens of
        the prompt that lie in the block are inside."""
        start_A = (
            self.prompt_R[row_A] - self.phase_R[row_A] + self.pointer_R[row_A] * self.block_size
        )
        end_A = self.prompt_R[row_A] + self.width
        return start_A, (start_A + self.block_size).minimum(end_A)

    def reveal(
        self, row_N: Tensor, column_N: Tensor, token_N: Tensor, logprob_N: Tensor, score_N: Tensor
    ) -> None:
        """Writes tokens at masked positions; ``count_step`` has already counted the step."""
        self.ids_F[self.first_R[row_N] + column_N] = token_N
        self.pending_RW[row_N, column_N] = False
        self.step_map_RW[row_N, column_N] = self.step_R[row_N]
        # statistics of a float64 model are float64
        self.logprob_RW[row_N, column_N] = logprob_N.to(self.logprob_RW.dtype)
        self.confidence_RW[row_N, column_N] = score_N.to(self.confidence_RW.dtype)

    def count_step(self, row_A: Tensor) -> None:
        self.step_R[row_A] += 1
        self.block_step_R[row_A] += 1

    def advance(self, row_A: Tensor, step_cap: bool = False) -> None:
        """Closes finished blocks and moves the pointers of these rows. ``step_cap``: a block also
        closes after as many steps as it has positions (rules that may idle)."""
        pending_AW = self.pending_RW[row_A]
        inside_AW = self.block_RW[row_A] == self.pointer_R[row_A][:, None]
        if step_cap:
            over_A = self.block_step_R[row_A] >= inside_AW.sum(1)
            pending_AW &= ~(over_A[:, None] & inside_AW)
            self.pending_RW[row_A] = pending_AW
        closed_A = ~(pending_AW & inside_AW).any(1)
        if not bool(closed_A.any()):
            return
        closed_C = row_A[closed_A]
        if self.stop_at_eos:
            self._stop_at_eos(closed_C, inside_AW[closed_A])
        elif self.early_stop:
            self._fill_after_eos(closed_C, inside_AW[closed_A])
        self._open_blocks(closed_C)

    def _open_blocks(self, row_C: Tensor) -> None:
        """Points rows at the first block with a masked position; blocks without one (hints) are
        passed over without a forward."""
        pending_CW = self.pending_RW[row_C]
        self.live_R[row_C] = pending_CW.any(1)
        first_C = pending_CW.to(torch.uint8).argmax(1, keepdim=True)
        pointer_C = self.block_RW[row_C].gather(1, first_C)
        inside_CW = self.block_RW[row_C] == pointer_C
        self.pointer_R[row_C] = pointer_C[:, 0]
        self.block_step_R[row_C] = 0
        self.block_count_R[row_C] = (pending_CW & inside_CW).sum(1)

    def _stop_at_eos(self, row_C: Tensor, inside_CW: Tensor) -> None:
        eos_CW = torch.isin(self.ids_of(row_C), self.eos_ids) & inside_CW
        ended_C = eos_CW.any(1)
        row_E, inside_EW = row_C[ended_C], inside_CW[ended_C]
        self.response_R[row_E] = eos_CW[ended_C].to(torch.uint8).argmax(1) + 1
        self.decoded_R[row_E] = _last_column(inside_EW)[:, 0] + 1
        self.pending_RW[row_E] = False

    def _fill_after_eos(self, row_C: Tensor, inside_CW: Tensor) -> None:
        ids_CW = self.ids_F[self._flat(row_C)]
        ended_C = (torch.isin(ids_CW, self.eos_ids) | ~inside_CW).all(1)
        if not bool(ended_C.any()):
            return
        row_E, inside_EW, ids_EW = row_C[ended_C], inside_CW[ended_C], ids_CW[ended_C]
        # the block's own last token: models with several end-of-text ids repeat one of them
        last_E1 = _last_column(inside_EW)
        fill_EW = torch.where(self.pending_RW[row_E], ids_EW.gather(1, last_E1), ids_EW)
        self.ids_F[self._flat(row_E)] = fill_EW
        self.pending_RW[row_E] = False


def _last_column(inside_EW: Tensor) -> Tensor:
    """int64 [E, 1], the last column that is inside."""
    return (inside_EW * torch.arange(inside_EW.shape[1], device=inside_EW.device)).argmax(
        1, keepdim=True
    )


def share_steps(phase_R: Tensor, config: SamplerConfig) -> Tensor:
    """int64 [R, K], steps of each block: one each, the rest shared out in proportion to the tokens
    beyond the first, rounded so that the sum is right. So one token a step (steps = window) stays
    one token a step in blocks that the prompt or the window's end cuts. Only where such a cut makes
    more blocks than steps does a row take more steps than configured: one per block."""
    size, width = config.block_size, config.max_new_tokens
    num_blocks = (int(phase_R.max()) + width + size - 1) // size
    edge_K = torch.arange(num_blocks + 1, device=phase_R.device) * size
    tokens_RK = (edge_K - phase_R[:, None]).clamp(0, width).diff(dim=1)
    more_RK = (tokens_RK - 1).clamp(min=0).cumsum(1)
    blocks_R = (tokens_RK > 0).sum(1)
    spare_R1 = (config.steps - blocks_R).clamp(min=0)[:, None]
    room_R1 = (width - blocks_R).clamp(min=1)[:, None]
    shared_RK = (more_RK * spare_R1 + room_R1 - 1) // room_R1
    return 1 + shared_RK.diff(dim=1, prepend=torch.zeros_like(spare_R1))
