"""From trees of rollouts to the rows of forward passes: each shared token once.

Causal models see a tree in depth-first order, every token the tokens of its own path
(``Visibility.tree``); the token at a fork predicts the first of each branch. Block models see
finished blocks and every recorded state of each block once per node (``ops.trace_pack``). A tree
above the row budget is cut at nodes: a part forwards the path above it again, with gradient, and
only its own tokens are targets. Source: spec of tree packing in TreePO, arXiv 2508.17445, and Tree
Training, arXiv 2511.00413.

Letters: ``N`` nodes, ``T`` rows, ``U`` targets of a pass, ``n`` tokens of a leaf's response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.algorithms.trace_rows import Traced, length_to_end, traced
from dlm_fast.ops import TraceNode, TracePack, Visibility, fill_bins, join_packs, trace_pack
from dlm_fast.rollout.trajectory import Group
from dlm_fast.rollout.tree import Forest, PackedTree


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeRows:
    """One forward pass over trees, or parts of them, and its targets."""

    input_ids: Tensor
    """int64 [T]"""
    visibility: Visibility
    rows: Tensor
    """int32 [U], rows of the target tokens; ``policy.predicting_rows`` says which predict them"""
    targets: Tensor
    """int64 [U]"""
    token: Tensor
    """int64 [U], which token of the forest each target is; no token is a target twice"""

    def to(self, device: torch.device | str) -> TreeRows:
        """For a model on ``device``."""
        return TreeRows(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeTokens:
    """What is forwarded and trained of the nodes of a tree, in its rows; the prompt first."""

    ids: tuple[Tensor, ...]
    """int64, with the tail of a block model's last block"""
    trainable: tuple[Tensor, ...]
    """bool"""
    step: tuple[Tensor, ...] | None = None
    """int32, the order of revelation, for block models"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Nodes of a tree that one pass forwards, in depth-first order with all their ancestors."""

    nodes: tuple[int, ...]
    is_own: tuple[bool, ...]
    """False: only forwarded, as the path above others"""
    size: int
    """rows"""


@dataclass(frozen=True, kw_only=True)
class TreeLayout:
    """What decides about the rows of forward passes."""

    kind: str
    block_size: int
    mask_id: int
    row_budget: int
    device: Any = "cpu"

    def node_tokens(self, tree: PackedTree, group: Group, eos_ids: Sequence[int]) -> NodeTokens:
        """Targets are the drawn tokens up to the first end of text."""
        lengths = tree.lengths.tolist()
        ids: list[Tensor] = [group.prompt_ids] * len(lengths)
        trainable = [torch.zeros(lengths[0], dtype=torch.bool)] * len(lengths)
        step = [torch.zeros(lengths[0], dtype=torch.int32)] * len(lengths)
        for trajectory, path in zip(group.trajectories, tree.paths, strict=True):
            response: Traced | None = None
            if self.kind == "block":
                response = traced(
                    trajectory, kind="block", eos_ids=eos_ids, block_size=self.block_size
                )
            own_ids = trajectory.response_ids if response is None else response.ids
            end = length_to_end(trajectory, eos_ids)
            learnt = torch.arange(len(own_ids)) < end if response is None else response.trainable[0]
            first = 0
            for place, node in enumerate(path[1:], 1):
                # what a block model decoded behind the response belongs to the leaf
                last = first + lengths[node] if place < len(path) - 1 else len(own_ids)
                ids[node], trainable[node] = own_ids[first:last], learnt[first:last]
                if response is not None:
                    step[node] = response.step[0, first:last]
                first = last
        return NodeTokens(
            ids=tuple(ids),
            trainable=tuple(trainable),
            step=tuple(step) if self.kind == "block" else None,
        )

    def rows(self, forest: Forest, tokens: Sequence[NodeTokens]) -> list[TreeRows]:
        """The forward passes that score all targets of the trees, each target once."""
        parts: list[tuple[int, Part]] = []
        for number, (tree, own) in enumerate(zip(forest.trees, tokens, strict=True)):
            parts += [(number, part) for part in self._parts(tree, own)]
        made = []
        for chosen in fill_bins([part.size for _, part in parts], self.row_budget):
            build = self._block_rows if self.kind == "block" else self._causal_rows
            rows = build(forest, tokens, [parts[i] for i in chosen])
            if rows.rows.numel():
                made.append(rows.to(self.device))
        return made

    def _parts(self, tree: PackedTree, tokens: NodeTokens) -> list[Part]:
        lengths = [ids.numel() for ids in tokens.ids]
        if tokens.step is None:
            return partition(tree, lengths, lengths, self.row_budget)
        starts, parents = tree.start_pos.tolist(), tree.parent.tolist()
        nodes = range(tree.num_nodes)
        rows = [
            lengths[n] + self._noisy_rows(starts[n], tokens.step[n], tokens.trainable[n])
            for n in nodes
        ]
        # a block that a fork cuts is replayed in the first branch, tokens before the fork included
        bound = {
            n
            for n in nodes[1:]
            if n == parents[n] + 1 and parents[n] > 0 and starts[n] % self.block_size
        }
        return partition(tree, rows, lengths, self.row_budget, bound)

    def _noisy_rows(self, start: int, step: Tensor, trainable: Tensor) -> int:
        """Rows of the states of a node's blocks, one state per block and step with targets."""
        place = trainable.nonzero()[:, 0]
        states = torch.stack([(start + place) // self.block_size, step[place].long()])
        return int(states.unique(dim=1).shape[1]) * self.block_size

    def _causal_rows(
        self, forest: Forest, tokens: Sequence[NodeTokens], parts: Sequence[tuple[int, Part]]
    ) -> TreeRows:
        parents: list[int] = []
        ids: list[Tensor] = []
        targets: list[Tensor] = []
        named: list[Tensor] = []
        for number, part in parts:
            tree, own = forest.trees[number], tokens[number]
            parents += _local_parents(tree, part, first=len(parents))
            first = forest.first_token[number] + tree.tok_off
            for node, is_own in zip(part.nodes, part.is_own, strict=True):
                ids.append(own.ids[node])
                learnt = own.trainable[node] if is_own else torch.zeros_like(own.trainable[node])
                targets.append(learnt)
                named.append(first[node] + torch.arange(len(learnt)))
        rows = torch.cat(targets).nonzero()[:, 0]
        input_ids = torch.cat(ids)
        return TreeRows(
            input_ids=input_ids,
            visibility=Visibility.tree(parents, [len(part) for part in ids]),
            rows=rows.to(torch.int32),
            targets=input_ids[rows],
            token=torch.cat(named)[rows],
        )

    def _block_rows(
        self, forest: Forest, tokens: Sequence[NodeTokens], parts: Sequence[tuple[int, Part]]
    ) -> TreeRows:
        joined = join_packs([self._trace_pack(forest.trees[k], tokens[k], p) for k, p in parts])
        first_node = torch.tensor([0, *(len(part.nodes) for _, part in parts)]).cumsum(0)
        first_token = torch.cat(
            [forest.first_token[k] + forest.trees[k].tok_off[list(part.nodes)] for k, part in parts]
        )
        node = first_node[joined.tree.long()] + joined.node.long()
        return TreeRows(
            input_ids=joined.input_ids,
            visibility=joined.visibility,
            rows=joined.rows,
            targets=joined.targets,
            token=first_token[node] + joined.token.long(),
        )

    def _trace_pack(self, tree: PackedTree, tokens: NodeTokens, part: Part) -> TracePack:
        assert tokens.step is not None
        nodes = []
        entries = zip(_local_parents(tree, part), part.nodes, part.is_own, strict=True)
        for parent, node, is_own in entries:
            # a node above the part is known from the start: clean rows and no states
            step = tokens.step[node].contiguous() if is_own else None
            learnt = tokens.trainable[node].contiguous() if is_own else None
            nodes.append(
                TraceNode(parent=parent, ids=tokens.ids[node], step=step, trainable=learnt)
            )
        return trace_pack(nodes, block_size=self.block_size, mask_id=self.mask_id)


def partition(
    tree: PackedTree,
    rows: Sequence[int],
    context_rows: Sequence[int],
    budget: int,
    bound: set[int] | None = None,
) -> list[Part]:
    """Nodes of a tree in parts of at most ``budget`` rows; a path that needs more has its own part.

    ``rows`` and ``context_rows`` are those of a node with its loss and above others. ``bound``:
    nodes that stay with their parent. Every node but the root is ``is_own`` in one part.
    """
    bound = bound or set()
    parents = tree.parent.tolist()
    parts: list[Part] = []
    nodes: list[int] = []
    size = above = 0

    def close() -> None:
        is_own = tuple(place >= above for place in range(len(nodes)))
        parts.append(Part(nodes=tuple(nodes), is_own=is_own, size=size))

    for node in range(1, tree.num_nodes):
        is_full = size + rows[node] > budget and node not in bound
        if not nodes or is_full:
            if nodes:
                close()
            # in depth-first order, whatever follows in this part hangs on these or on its own nodes
            nodes = _ancestors(parents, node)
            size, above = sum(context_rows[n] for n in nodes), len(nodes)
        nodes.append(node)
        size += rows[node]
    if nodes:
        close()
    return parts


def _ancestors(parents: Sequence[int], node: int) -> list[int]:
    """From the root down, without the node."""
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[:0:-1]


def _local_parents(tree: PackedTree, part: Part, first: int = 0) -> list[int]:
    """Parents as places in the part, which begin with ``first``; -1 for the root."""
    place = {node: first + k for k, node in enumerate(part.nodes)}
    return [place.get(int(tree.parent[node]), -1) for node in part.nodes]


def flat_values(tree: PackedTree, value_U: Tensor) -> list[Tensor]:
    """Numbers of a tree's tokens as each leaf's sequence has them, prompt included.

    A gather, so a loss that looks at whole responses (ratios of sequences, terms of length) can be
    written per leaf: its gradient adds up in the shared tokens by itself.
    """
    return list(value_U[tree.leaf_path.to(value_U.device)].split(tree.path_len.tolist()))
