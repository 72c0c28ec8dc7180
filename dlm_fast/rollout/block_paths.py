"""Blocks of many paths, denoised together: block-diffusion models on trees of rollouts.

The block under denoising belongs to its path alone. When no mask is left in it, its tokens join the
path; with a pool (``pooled_blocks``) their keys are then computed once, before the path forks.

Letters: ``A`` paths of one forward, ``n`` positions of the longest block, ``N`` masked positions,
``K`` positions revealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.ops import Rng, Stream, TokenStats
from dlm_fast.ops.visibility import Visibility
from dlm_fast.rollout.network import Forward
from dlm_fast.rollout.path_network import Drawing
from dlm_fast.rollout.path_nodes import PathNode
from dlm_fast.rollout.unmask import ConfiguredRule, Decision, check_finite, score_of
from dlm_fast.rollout.window import share_steps


@dataclass(kw_only=True, eq=False)
class OpenBlock:
    """The block that a path is denoising: lists over its positions."""

    start: int
    """position of its first token, on the grid; the end of the prompt may lie inside"""
    ids: list[int]
    """the mask id where masked"""
    is_masked: list[bool]
    steps: int
    """steps that its schedule has"""
    num_masked: int
    """masks that it began with"""
    num_left: int
    """masks that it still has"""
    step: int = 0
    """forwards so far"""
    step_map: list[int]
    logprobs: list[float]
    confidences: list[float]


Opened = tuple[PathNode, OpenBlock]
"""a path and its block"""


class BlockPaths:
    """The definition: every step forwards the whole path with its block."""

    def __init__(self, policy: Any, forward: Forward, drawing: Drawing) -> None:
        family, sampler = policy.family, drawing.sampler
        self._policy, self._forward, self._drawing = policy, forward, drawing
        self._size, self._mask_id = family.block_size, family.mask_id
        self._device = getattr(policy, "device", "cpu")
        self._eos_ids = torch.tensor(sorted(drawing.eos_ids))
        self._rule = ConfiguredRule(sampler)
        self._steps: dict[int, list[int]] = {}
        """tokens of the prompt in the first block -> steps of each block"""
        self._blocks: dict[PathNode, OpenBlock] = {}
        self.tokens_forwarded = 0

    @property
    def pages_peak(self) -> int:
        """No keys are kept."""
        return 0

    def step(self, nodes: Sequence[PathNode]) -> None:
        """One denoising forward of each node's block; a finished block joins its node."""
        self._prepare(nodes)
        for node in nodes:
            if node not in self._blocks:
                self._blocks[node] = self._begin(node)
        blocks = [self._blocks[node] for node in nodes]
        width = max(len(block.ids) for block in blocks)
        masked_An = torch.tensor(
            [block.is_masked + [False] * (width - len(block.ids)) for block in blocks]
        )
        row_N, column_N = masked_An.nonzero(as_tuple=True)
        start_A = torch.tensor([block.start for block in blocks])
        step_A = torch.tensor([node.step for node in nodes], dtype=torch.int32)
        draw = self._drawing.options(
            [nodes[row] for row in row_N.tolist()], start_A[row_N] + column_N, step_A[row_N]
        )
        opened = list(zip(nodes, blocks, strict=True))
        stats = self._statistics(opened, (row_N, column_N), draw)
        stats = TokenStats(*(values.cpu() for values in stats))
        score_N = score_of(stats, self._drawing.sampler, self._eos_ids)
        decision = Decision(
            stats=stats,
            score_N=score_N,
            row_N=row_N,
            column_N=column_N,
            masked_AW=masked_An,
            selectable_AW=masked_An,
            quota_A=torch.tensor([_quota(block) for block in blocks], dtype=torch.int32),
            step_A=step_A,
            block_step_A=torch.tensor([block.step for block in blocks], dtype=torch.int32),
            sequence_A=torch.arange(len(nodes)),
            rng=Rng.of(self._drawing.seed, Stream.UNMASK, [n.key for n in nodes]).at(step=step_A),
        )
        chosen_K = self._rule(decision)[row_N, column_N].nonzero()[:, 0]
        check_finite(score_N[chosen_K])
        drawn_K = (stats.token[chosen_K], stats.logprob[chosen_K], score_N[chosen_K])
        self._reveal(opened, (row_N[chosen_K], column_N[chosen_K]), drawn_K)

    def finish(self, node: PathNode) -> None:
        """Nothing is kept."""

    def split(self, node: PathNode, count: int) -> PathNode:
        return node.split(count)

    def forget(self, nodes: Sequence[PathNode]) -> None:
        for node in nodes:
            self._blocks.pop(node, None)

    def _prepare(self, nodes: Sequence[PathNode]) -> None:
        """What has to be there before these nodes are denoised."""

    def _statistics(
        self, opened: Sequence[Opened], at_N: tuple[Tensor, Tensor], draw: dict[str, Any]
    ) -> TokenStats:
        """Draws at positions ``at_N`` (path, place in its block) of the blocks."""
        ids, lengths = [], []
        for node, block in opened:
            ids += node.path_tokens()[: block.start] + block.ids
            lengths.append(block.start + len(block.ids))
        size_A = torch.tensor([len(block.ids) for _, block in opened])
        begin_A = torch.tensor(lengths).cumsum(0) - size_A
        self.tokens_forwarded += len(ids)
        return self._forward(
            torch.tensor(ids, device=self._device),
            Visibility.block_causal(lengths, self._size).to(self._device),
            rows=(begin_A[at_N[0]] + at_N[1]).to(self._device, torch.int32),
            **draw,
        )

    def _begin(self, node: PathNode) -> OpenBlock:
        """The next block of the grid, with what the path already has of it."""
        start = node.stop // self._size * self._size
        given = node.path_tokens()[start:]
        stop = min(start + self._size, node.start + node.room)
        num_masked = stop - start - len(given)
        root = node.path()[0]
        phase = root.stop % self._size
        if phase not in self._steps:
            steps_RK = share_steps(torch.tensor([phase]), self._drawing.sampler)
            self._steps[phase] = steps_RK[0].tolist()
        number = (start - root.stop + phase) // self._size
        size = stop - start
        return OpenBlock(
            start=start,
            ids=given + [self._mask_id] * num_masked,
            is_masked=[False] * len(given) + [True] * num_masked,
            steps=self._steps[phase][number],
            num_masked=num_masked,
            num_left=num_masked,
            step_map=[0] * size,
            logprobs=[0.0] * size,
            confidences=[0.0] * size,
        )

    def _reveal(
        self, opened: Sequence[Opened], at_K: tuple[Tensor, Tensor], drawn_K: tuple[Tensor, ...]
    ) -> None:
        """Writes tokens, log-probabilities and confidences at positions ``at_K``; closes blocks
        without a mask."""
        for node, block in opened:
            node.step += 1
            block.step += 1
        columns = (values.tolist() for values in (*at_K, *drawn_K))
        for row, place, token, logprob, confidence in zip(*columns, strict=True):
            node, block = opened[row]
            block.ids[place], block.is_masked[place] = token, False
            block.step_map[place] = node.step
            block.logprobs[place], block.confidences[place] = logprob, confidence
            block.num_left -= 1
        for node, block in opened:
            if not block.num_left:
                self._close(node, self._blocks.pop(node))

    def _close(self, node: PathNode, block: OpenBlock) -> None:
        """The block's tokens join the path; behind an end-of-text token they are its tail."""
        new = slice(len(block.ids) - block.num_masked, None)
        ids = block.ids[new]
        stops = [place for place, token in enumerate(ids) if token in self._drawing.eos_ids]
        count = stops[0] + 1 if stops else len(ids)
        for name, values in (
            ("tokens", ids),
            ("logprobs", block.logprobs[new]),
            ("confidences", block.confidences[new]),
            ("steps", block.step_map[new]),
        ):
            getattr(node, name).extend(values[:count])
            tail = "tail" if name == "tokens" else f"tail_{name}"
            setattr(node, tail, values[count:])
        node.is_stopped = bool(stops)


def _quota(block: OpenBlock) -> int:
    """Masks shared out evenly over the steps, the first ones take the remainder; at least one."""
    each, rest = divmod(block.num_masked, block.steps)
    return max(each + (block.step < rest), 1)
