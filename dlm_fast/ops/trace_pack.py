"""Packed training rows of block-diffusion trajectories: a clean stream and every noisy state once.

A model whose attention is block-causal sees, while it decodes a block, the finished blocks before
it and the block's own state. So one pack holds each finished token once (clean rows) and, for each
block and each round of its decoding, the block as it was before that round (a noisy chunk, whose
masked tokens revealed in the round are the targets). All responses of a prompt, or all paths of a
tree, share the rows that they have in common. One forward of the pack gives every conditional of
every recorded step. Source: TraceRL, arXiv 2509.06949, section 4 (a row per slice there).

Letters: ``L`` tokens of a node, ``C`` recorded orders, ``T`` rows, ``U`` targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops.visibility import Visibility


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceNode:
    """A run of tokens: a prompt, a response, or a segment of a tree."""

    parent: int
    """index of the node that it continues; -1: the root"""
    ids: Tensor
    """int64 [L], final tokens"""
    step: Tensor | None = None
    """int32 [L] or [C, L], when each was revealed, from 1; 0: known from the start (as all of a
    prompt, for which None stands). Only the order matters"""
    trainable: Tensor | None = None
    """bool, as ``step``: which tokens may be targets; None: those that have a step"""


@dataclass(frozen=True, kw_only=True, eq=False)
class TracePack:
    """Rows of one forward pass, and which of them predict which token."""

    input_ids: Tensor
    """int64 [T]"""
    visibility: Visibility
    """of the T rows; positions are those in the sequence, so a position occurs many times"""
    rows: Tensor
    """int32 [U], rows of the targets"""
    targets: Tensor
    """int64 [U], the tokens to be predicted there"""
    tree: Tensor
    """int32 [U], which of the packed trees"""
    node: Tensor
    """int32 [U], which node of the tree holds the token"""
    token: Tensor
    """int32 [U], its index in the node"""
    step: Tensor
    """int32 [U], the round's step, after merging"""
    copy: Tensor
    """int32 [U], which recorded order"""

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]


def trace_pack(
    nodes: Sequence[TraceNode],
    *,
    block_size: int,
    mask_id: int,
    shrink: int = 1,
    grid_shift: int = 0,
    last_block_clean: bool = False,
) -> TracePack:
    """The rows of one tree; ``nodes`` in depth-first order, the root first.

    ``shrink`` merges so many neighbouring steps of a block into one. Blocks lie on the grid from
    position 0; ``grid_shift`` moves it to the left (compatibility with trainers that count blocks
    from the end of the prompt, P tokens: -P modulo ``block_size``). A block that a fork cuts
    belongs to each child; its tokens from before the fork are targets in the first child alone.
    ``last_block_clean`` keeps clean rows that no row sees.
    """
    checked = _check(nodes, block_size, shrink, grid_shift)
    made = extension().trace_pack(
        addresses(checked.parent, checked.start, checked.ids, checked.step, checked.trainable),
        len(nodes),
        checked.step.shape[0],
        (block_size, mask_id, shrink, grid_shift),
        last_block_clean,
    )
    rows, targets = made.num_rows, made.num_targets
    input_ids, position_ids = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
    intervals = torch.empty(rows, 4, dtype=torch.int32)
    row, step, copy = (torch.empty(targets, dtype=torch.int32) for _ in range(3))
    flat = torch.empty(targets, dtype=torch.int64)
    made.copy(addresses(input_ids, position_ids, intervals), addresses(row, flat, step, copy))
    node = torch.searchsorted(checked.start, flat, right=True) - 1
    return TracePack(
        input_ids=input_ids,
        visibility=_visibility(intervals, position_ids),
        rows=row,
        targets=checked.ids[flat],
        tree=torch.zeros_like(row),
        node=node.to(torch.int32),
        token=(flat - checked.start[node]).to(torch.int32),
        step=step,
        copy=copy,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceConditional:
    """One block before one round, on its own: what the model saw when it revealed the targets."""

    input_ids: Tensor
    """int64 [n], finished blocks, then the block as it was; block-causal attention on the grid"""
    targets: tuple[tuple[int, int, int, int], ...]
    """(row, node, index in the node, recorded order) of each target"""
    step: int


def trace_conditionals_ref(
    nodes: Sequence[TraceNode],
    *,
    block_size: int,
    mask_id: int,
    shrink: int = 1,
    grid_shift: int = 0,
) -> list[TraceConditional]:
    """The definition: every conditional as a sequence of its own, in the order of leaves.

    A target that several leaves share stands with the first of them.
    """
    checked = _check(nodes, block_size, shrink, grid_shift)
    starts = checked.start.tolist()
    found: list[TraceConditional] = []
    seen: set[tuple[int, int, int]] = set()
    for leaf in range(len(nodes)):
        if any(node.parent == leaf for node in nodes):
            continue
        path = [leaf]
        while nodes[path[0]].parent >= 0:
            path.insert(0, nodes[path[0]].parent)
        flat = [i for node in path for i in range(starts[node], starts[node + 1])]
        blocks = [(p + grid_shift) // block_size for p in range(len(flat))]
        for copy, block in itertools.product(range(checked.step.shape[0]), sorted(set(blocks))):
            first = blocks.index(block)
            inside = flat[first : first + blocks.count(block)]
            steps = _merged([int(checked.step[copy, i]) for i in inside], shrink)
            for step in sorted(set(steps) - {0}):
                targets = []
                for row, token in enumerate(inside):
                    node = int(torch.searchsorted(checked.start, token, right=True)) - 1
                    key = (node, token - starts[node], copy)
                    if steps[row] == step and checked.trainable[copy, token] and key not in seen:
                        targets.append((first + row, *key))
                seen.update(target[1:] for target in targets)
                ids = checked.ids[torch.tensor(flat[:first] + inside)]
                ids[first:][torch.tensor(steps) >= step] = mask_id
                if targets:
                    found.append(TraceConditional(input_ids=ids, targets=tuple(targets), step=step))
    return found


def _merged(steps: Sequence[int], shrink: int) -> list[int]:
    """Steps of one block, ``shrink`` neighbouring ones as the last of them; 0 stays."""
    distinct = sorted(set(steps) - {0})
    groups = [distinct[i : i + shrink] for i in range(0, len(distinct), shrink)]
    last = {step: group[-1] for group in groups for step in group}
    return [last.get(step, 0) for step in steps]


def join_packs(packs: Sequence[TracePack]) -> TracePack:
    """Packs behind each other; no row of one sees a row of another. ``tree`` counts on."""
    if not packs:
        raise ValueError("join_packs: no packs given")
    first_row = list(itertools.accumulate((p.num_rows for p in packs), initial=0))
    trees = [int(p.tree.max()) + 1 if p.tree.numel() else 1 for p in packs]
    first_tree = list(itertools.accumulate(trees, initial=0))
    intervals = [p.visibility.intervals + first for p, first in zip(packs, first_row, strict=False)]
    return TracePack(
        input_ids=torch.cat([p.input_ids for p in packs]),
        visibility=_visibility(
            torch.cat(intervals), torch.cat([p.visibility.position_ids for p in packs])
        ),
        rows=torch.cat([p.rows + first for p, first in zip(packs, first_row, strict=False)]),
        tree=torch.cat([p.tree + first for p, first in zip(packs, first_tree, strict=False)]),
        **{
            name: torch.cat([getattr(p, name) for p in packs])
            for name in ("targets", "node", "token", "step", "copy")
        },
    )


def fill_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of items, in bins of at most ``budget``; a larger item has a bin of its own.

    First-fit decreasing; the bins come in the order of their first item, and so do their items.
    """
    if budget < 1:
        raise ValueError(f"fill_bins: budget must be at least 1, got {budget}")
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        place = next((b for b, room in enumerate(free) if room >= size), None)
        if place is None:
            bins.append([])
            free.append(budget)
            place = len(bins) - 1
        bins[place].append(index)
        free[place] -= size
    return sorted(sorted(members) for members in bins)


def _visibility(intervals: Tensor, position_ids: Tensor) -> Visibility:
    # a noisy row has no one predecessor; models with a shift are not block-causal
    pred = torch.full(position_ids.shape, -1, dtype=torch.int32)
    return Visibility(intervals=intervals, position_ids=position_ids, pred=pred)


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """Flat arrays of checked nodes."""

    parent: Tensor
    start: Tensor
    ids: Tensor
    step: Tensor
    trainable: Tensor


def _check(nodes: Sequence[TraceNode], block_size: int, shrink: int, grid_shift: int) -> _Tree:
    op = "trace_pack"
    for name, value, ok, rule in (
        ("block_size", block_size, block_size >= 1, "at least 1"),
        ("shrink", shrink, shrink >= 1, "at least 1"),
        ("grid_shift", grid_shift, 0 <= grid_shift < block_size, f"in 0..{block_size - 1}"),
    ):
        if not ok:
            raise ValueError(f"{op}: {name} must be {rule}, got {value}")
    if not nodes:
        raise ValueError(f"{op}: no nodes given; the first one is the root, a prompt")
    copies = {n.step.shape[0] for n in nodes if n.step is not None and n.step.dim() == 2}
    if len(copies) > 1:
        raise ValueError(f"{op}: all nodes need as many recorded orders, got {sorted(copies)}")
    shape = (copies.pop() if copies else 1,)
    steps, trainable = [], []
    for index, node in enumerate(nodes):
        if node.ids.dtype != torch.int64 or node.ids.dim() != 1:
            raise TypeError(
                f"{op}: nodes[{index}].ids must be int64 [L], got {node.ids.dtype} "
                f"{list(node.ids.shape)}"
            )
        step = torch.zeros_like(node.ids, dtype=torch.int32) if node.step is None else node.step
        mark = step > 0 if node.trainable is None else node.trainable
        for name, given, dtype in (("step", step, torch.int32), ("trainable", mark, torch.bool)):
            if given.dtype != dtype or given.shape[-1:] != node.ids.shape or given.dim() > 2:
                raise TypeError(
                    f"{op}: nodes[{index}].{name} must be {dtype} with a last dimension of "
                    f"{node.ids.numel()}, got {given.dtype} {list(given.shape)}"
                )
        steps.append(step.expand(*shape, -1))
        trainable.append(mark.expand(*shape, -1))
        if bool((trainable[-1] & (steps[-1] == 0)).any()):
            raise ValueError(f"{op}: nodes[{index}] has trainable tokens without a step")
    lengths = [node.ids.numel() for node in nodes]
    return _Tree(
        parent=torch.tensor([node.parent for node in nodes], dtype=torch.int64),
        start=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64),
        ids=torch.cat([node.ids for node in nodes]).contiguous(),
        step=torch.cat(steps, dim=1).contiguous(),
        trainable=torch.cat(trainable, dim=1).contiguous(),
    )
