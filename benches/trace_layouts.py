"""The rows that score a recorded response, as open trainers lay them out, and as plain torch packs.

Letters: ``S`` slices, ``L`` rows of a slice, ``U`` targets, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm_fast.algorithms.trace_rows import TargetRows
from dlm_fast.rollout.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class DenseRows:
    """Sequences of one length under one dense mask."""

    input_ids: Tensor
    """int64 [S, L]"""
    position_ids: Tensor
    """int64 [S, L]"""
    mask: Tensor
    """bool [1, 1, L, L]"""
    first_row: int
    """rows from here on may be targets"""
    rows: Tensor
    """int64 [U], places of the targets in the flat rows"""
    targets: Tensor
    """int64 [U], their tokens"""
    token: Tensor
    """int64 [U], index in the response"""

    @property
    def num_rows(self) -> int:
        return self.input_ids.numel()


def published_rows(trajectory: Trajectory, block_size: int, mask_id: int) -> DenseRows:
    """A row [prompt | clean response | noisy response] for every round.

    Slice l holds round l of every block. Blocks lie on the grid from position 0, so the prompt's
    last tokens stand before the noisy response too where a block holds both; the clean copy of the
    last block, which nobody sees, is left out.
    """
    assert trajectory.step_map is not None
    prompt, ids = trajectory.prompt_length, trajectory.input_ids
    length = ids.numel()
    clean = (length - 1) // block_size * block_size
    noisy = torch.arange(prompt // block_size * block_size, length)
    position = torch.cat([torch.arange(clean), noisy])
    block, is_noisy = position // block_size, torch.arange(position.numel()) >= clean
    earlier = block[None, :] < block[:, None]
    same = block[None, :] == block[:, None]
    mask = ~is_noisy[None, :] & (earlier | (same & ~is_noisy[:, None]))
    mask |= is_noisy[:, None] & is_noisy[None, :] & same
    round_of = _rounds(trajectory.step_map, (prompt + torch.arange(length - prompt)) // block_size)
    input_ids, rows, token = [], [], []
    for number in range(int(round_of.max()) + 1):
        hidden = torch.cat([torch.zeros(prompt, dtype=torch.bool), round_of >= number])
        noisy_ids = torch.where(hidden, mask_id, ids)[noisy]
        chosen = (round_of == number).nonzero()[:, 0]
        rows.append(number * position.numel() + clean + prompt + chosen - int(noisy[0]))
        input_ids.append(torch.cat([ids[:clean], noisy_ids]))
        token.append(chosen)
    tokens = torch.cat(token)
    return DenseRows(
        input_ids=torch.stack(input_ids),
        position_ids=position.expand(len(input_ids), -1),
        mask=mask[None, None],
        first_row=clean,
        rows=torch.cat(rows),
        targets=ids[prompt + tokens],
        token=tokens,
    )


def recorded_steps(
    prompt: int, response: int, block_size: int, steps: int, generator: torch.Generator
) -> Tensor:
    """int32 [R]: ``steps`` steps spread over the blocks at random, at least one in each and no more
    than it has tokens; which tokens they reveal is random."""
    block = (prompt + torch.arange(response)) // block_size
    sizes = block.unique(return_counts=True)[1].tolist()
    counts = [1] * len(sizes)
    while sum(counts) < steps:
        chosen = int(torch.randint(0, len(sizes), (), generator=generator))
        counts[chosen] += counts[chosen] < sizes[chosen]
    found: list[int] = []
    done = 0
    for size, count in zip(sizes, counts, strict=True):
        own = [*range(count), *torch.randint(0, count, (size - count,), generator=generator)]
        order = torch.randperm(size, generator=generator).tolist()
        found += [done + 1 + int(own[i]) for i in order]
        done += count
    return torch.tensor(found, dtype=torch.int32)


def _rounds(step: Tensor, block: Tensor) -> Tensor:
    """int64 [R]: which of its block's steps revealed each token, from 0."""
    keys, of_token = torch.stack([block, step.long()]).unique(dim=1, return_inverse=True)
    first = torch.searchsorted(keys[0].contiguous(), keys[0].contiguous())
    return (torch.arange(keys.shape[1]) - first)[of_token]


def packed_rows(rows: TargetRows) -> DenseRows:
    """The library's rows as one sequence under a dense mask."""
    return DenseRows(
        input_ids=rows.input_ids[None],
        position_ids=rows.visibility.position_ids[None],
        mask=rows.visibility.dense()[None, None],
        first_row=0,
        rows=rows.rows.long(),
        targets=rows.targets,
        token=rows.token,
    )


def eager_logprob(
    backbone: Callable[..., Tensor], head: nn.Linear, dense: DenseRows, mask_id: int, all_rows: bool
) -> Tensor:
    """[U], as plain torch has it. ``all_rows``: logits of every row, log-softmax of those that may
    be targets, as open trainers do; else of the targets alone."""
    hidden_SLD = backbone(dense.input_ids, dense.position_ids, dense.mask)
    if not all_rows:
        logits_UV = head(hidden_SLD.flatten(0, 1)[dense.rows])
        logits_UV[:, mask_id] = -torch.inf
        return -F.cross_entropy(logits_UV, dense.targets, reduction="none")
    length = dense.input_ids.shape[1]
    logits_SLV = head(hidden_SLD)[:, dense.first_row :]
    logits_SLV[..., mask_id] = -torch.inf
    logprob_SLV = logits_SLV.log_softmax(-1)
    slice_U, row_U = dense.rows // length, dense.rows % length - dense.first_row
    return logprob_SLV[slice_U, row_U, dense.targets]
