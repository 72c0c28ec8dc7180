"""The order in which a model would reveal a demonstration: what a rollout records, for given text.

In each step of a block the model says at every masked position how sure it is of its own most
likely token; the surest positions are revealed, with the *true* tokens. So the states are those
that greedy decoding would pass through had it been right every time. A block begins with the true
blocks before it, whatever happened inside them: all blocks of all demonstrations take their steps
side by side, and there are as many forward passes as a block has steps.
Source: TraceRL, arXiv 2509.06949 (two tokens a step, neighbouring steps merged by ``shrink``).

Letters: ``n`` tokens of a response, ``K`` blocks, ``B`` places of a block, ``U`` masked tokens of a
forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dlm_fast.algorithms.sft_states import blocks_of, one_block_at_a_time
from dlm_fast.algorithms.trace_rows import TargetRows, Traced
from dlm_fast.algorithms.trace_tokens import Layout
from dlm_fast.ops import unmask_select

Confidence = Callable[[TargetRows], Tensor]
"""[U] on any device: how sure the model is at the rows of the masked tokens"""


def collect_traces(
    responses: Sequence[Traced], *, layout: Layout, tokens_per_step: int, confidence: Confidence
) -> list[Traced]:
    """The responses with the steps, 1, 2, ... in the order of blocks, that reveal their targets.

    Ties go to the position further left. States have one step each, so ``layout.shrink`` is idle.
    """
    blocks = [blocks_of(r, layout.kind, layout.block_size) for r in responses]
    rounds = [torch.zeros_like(block_n) for block_n in blocks]
    pending = [r.trainable[0].clone() for r in responses]
    step = 0
    while any(bool(mark.any()) for mark in pending):
        step += 1
        states = [
            _state(response, mark, layout)
            for response, mark in zip(responses, pending, strict=True)
        ]
        sure = [torch.zeros(len(mark), dtype=torch.float64) for mark in pending]
        for rows in layout.rows(states):
            found_U = confidence(rows.to(layout.device)).double().cpu()
            for index in rows.response.unique().tolist():
                own = rows.response == index
                sure[index][rows.token[own]] = found_U[own]
        for index, mark in enumerate(pending):
            chosen_n = _surest(sure[index], mark, blocks[index], tokens_per_step)
            rounds[index][chosen_n] = step
            pending[index] = mark & ~chosen_n
    return [
        replace(response, step=_in_order(response, round_n, block_n)[None])
        for response, round_n, block_n in zip(responses, rounds, blocks, strict=True)
    ]


def _state(response: Traced, pending_n: Tensor, layout: Layout) -> Traced:
    """What is not pending is known; what is, is masked and asked for."""
    known = response.trainable[0] & ~pending_n
    state = replace(response, step=response.step.masked_fill(known, 0), trainable=pending_n[None])
    return state if layout.kind == "block" else one_block_at_a_time(state, layout.block_size)


def _surest(sure_n: Tensor, pending_n: Tensor, block_n: Tensor, count: int) -> Tensor:
    """bool [n]: the ``count`` surest pending tokens of each block."""
    if not len(block_n):
        return pending_n
    # a block's tokens lie next to one another, so a column is a place counted from its first
    column_n = torch.arange(len(block_n)) - torch.searchsorted(block_n, block_n)
    score_KB = torch.zeros(int(block_n[-1]) + 1, int(column_n.max()) + 1, dtype=torch.float64)
    pending_KB = torch.zeros_like(score_KB, dtype=torch.bool)
    score_KB[block_n, column_n] = sure_n
    pending_KB[block_n, column_n] = pending_n
    chosen_KB = unmask_select(score_KB, pending_KB, "top_k", quota=count)
    return chosen_KB[block_n, column_n]


def _in_order(response: Traced, round_n: Tensor, block_n: Tensor) -> Tensor:
    """int32 [n]: rounds of a block as steps of the response; what was no target stays as it was."""
    step_n, before = response.step[0].clone(), 0
    for block in block_n.unique().tolist():
        revealed = (block_n == block) & (round_n > 0)
        step_n[revealed] = (before + round_n[revealed]).to(torch.int32)
        before += int(round_n[revealed].max()) if bool(revealed.any()) else 0
    return step_n
