"""Demonstrations as states of decoding: what is masked in each, and which tokens are targets.

A demonstration was not decoded, so its states are drawn (a rate of masking per demonstration or
per block) or, for causal attention, the text itself. ``trace_rows`` turns them into forward passes.
Source: TraceRL, arXiv 2509.06949, the supervised part of its experiments.

Letters: ``n`` tokens of a response, ``C`` drawn orders, ``K`` blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dlm_fast.algorithms.trace_rows import NEVER, TargetRows, Traced, traced
from dlm_fast.ops import Visibility, fill_bins
from dlm_fast.rollout.trajectory import Trajectory


def text_length(trajectory: Trajectory, eos_ids: Sequence[int]) -> int:
    """Tokens up to the first end of text, which counts.

    By its place, not by its id: where padding has the same id, the tokens behind the first are
    padding and the first is not.
    """
    is_end = torch.isin(trajectory.response_ids, torch.tensor(list(eos_ids), dtype=torch.int64))
    ends = is_end.nonzero()[:, 0]
    return int(ends[0]) + 1 if len(ends) else trajectory.response_length


def demonstrated(
    trajectory: Trajectory,
    *,
    kind: str,
    eos_ids: Sequence[int],
    block_size: int,
    window: int,
    num_pads: int | None,
) -> Traced:
    """A demonstration with all that may be a target as one step.

    Targets are the tokens up to the first end of text and ``num_pads`` such tokens behind it, which
    are added where they lack (``window`` permitting); None: all that is there. What lies behind
    them is masked in every state. For a block model that is the rest of the last block, as decoding
    would see it, and nothing else.
    """
    ids = trajectory.response_ids
    length = len(ids)
    if num_pads is not None:
        length = text_length(trajectory, eos_ids)
        if length and int(ids[length - 1]) in eos_ids:
            length = max(length, min(length + num_pads, window))
            missing = max(0, length - len(ids))
            ids = torch.cat([ids, ids.new_full((missing,), eos_ids[0])])
    if kind == "block" and length:
        prompt = trajectory.prompt_length
        end = -(-(prompt + length) // block_size) * block_size - prompt
        end = max(length, min(end, window))
        ids = torch.nn.functional.pad(ids[:end], (0, max(0, end - len(ids))))
    trainable = torch.arange(len(ids)) < length
    step = torch.where(trainable, 1, NEVER).to(torch.int32)
    return Traced(
        trajectory=trajectory,
        ids=ids,
        step=step[None],
        trainable=trainable[None],
        is_recorded=False,
    )


def recorded(
    trajectory: Trajectory,
    *,
    kind: str,
    eos_ids: Sequence[int],
    block_size: int,
    num_pads: int | None,
) -> Traced:
    """A response that comes with the order of its tokens, as a rollout does."""
    pads = trajectory.response_length if num_pads is None else num_pads
    return traced(trajectory, kind=kind, eos_ids=eos_ids, block_size=block_size, num_pads=pads)


def blocks_of(response: Traced, kind: str, block_size: int) -> Tensor:
    """int64 [n], the block in which decoding would reveal each token, from 0.

    Block models have a grid from position 0 on; for others the first block begins behind the
    prompt.
    """
    offset = response.trajectory.prompt_length % block_size if kind == "block" else 0
    return (torch.arange(len(response.ids)) + offset) // block_size


def one_block_at_a_time(response: Traced, block_size: int) -> Traced:
    """For full attention: each order once per block, [C * K, n].

    Earlier blocks are known, the block itself is as the order says and alone has targets, later
    ones are masked. Tokens that were never visible stay so.
    """
    block_n = blocks_of(response, "full", block_size)
    block_Kn = torch.arange(int(block_n[-1]) + 1 if len(block_n) else 0)[:, None]
    step_C1n, trainable_C1n = response.step[:, None], response.trainable[:, None]
    known = (block_n < block_Kn) & (step_C1n != NEVER)
    step = torch.where(known, 0, step_C1n).masked_fill(block_n > block_Kn, NEVER)
    count = len(response.ids)
    return replace(
        response,
        step=step.reshape(-1, count),
        trainable=(trainable_C1n & (block_n == block_Kn)).reshape(-1, count),
    )


def rows_of_causal(responses: Sequence[Traced], *, row_budget: int) -> Iterator[TargetRows]:
    """Causal attention: each response behind its prompt, each token predicted from those before."""
    sizes = [r.trajectory.prompt_length + int(r.trainable[0].sum()) for r in responses]
    for members in fill_bins(sizes, row_budget):
        ids, rows, tokens, start = [], [], [], 0
        for index in members:
            response = responses[index]
            prompt = response.trajectory.prompt_length
            ids.append(torch.cat([response.trajectory.prompt_ids, response.ids])[: sizes[index]])
            tokens.append(torch.arange(sizes[index] - prompt))
            rows.append(start + prompt + tokens[-1])
            start += sizes[index]
        input_ids, token_U, row_U = torch.cat(ids), torch.cat(tokens), torch.cat(rows)
        counts = torch.tensor([len(token) for token in tokens])
        zero_U = torch.zeros_like(token_U)
        yield TargetRows(
            input_ids=input_ids,
            visibility=Visibility.causal([sizes[index] for index in members]),
            rows=row_U.to(torch.int32),
            targets=input_ids[row_U],
            response=torch.tensor(members).repeat_interleave(counts),
            copy=zero_U,
            token=token_U,
            step=zero_U,
        )
