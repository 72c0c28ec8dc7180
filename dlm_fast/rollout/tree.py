"""The tree of a prompt's rollouts: which tokens its leaves share.

Rows of nodes are in depth-first preorder, children in order of creation, so the subtree of node n
is the rows n..subtree_end[n], and tokens, laid node by node, are the pack of a training pass.
Source: TreePO, arXiv 2508.17445 (segments, groups of leaves below a common prefix).

Letters: ``N`` nodes, ``U`` unique tokens, ``W`` leaves, ``S`` tokens of all leaves' paths, shared
ones once per leaf, ``Q`` pairs of a leaf and a node of its path.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dlm_fast.rollout.trajectory import Group, Trajectory

_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTree:
    """The rollouts of one prompt. Tensors lie on the CPU, integers are int64."""

    tokens: Tensor
    """[U], node by node; the root's are the prompt"""
    tok_off: Tensor
    """[N+1], first token of each node"""
    parent: Tensor
    """[N], -1 for the root, which is row 0; a parent stands before its children"""
    node_id: Tensor
    """[N], the sampler's name of each node, in order of creation; -1 for the root"""
    logp: Tensor
    """float32 [U], log-probability as recorded while decoding; NaN where there is none"""
    leaf_node: Tensor
    """[W], last node of each leaf; leaves as in the group"""
    group_id: int = 0
    """names the tree"""

    @staticmethod
    def of(group: Group) -> PackedTree:
        """Of a group's trajectories; a flat one is a node of its own behind the prompt.

        ValueError where leaves contradict each other about a node that they share.
        """
        if not group.trajectories:
            raise ValueError(f"the group of example {group.task_id} has no rollouts to make a tree")
        nodes = _Nodes(group.prompt_ids)
        leaf_keys = [nodes.add(i, t) for i, t in enumerate(group.trajectories)]
        order = nodes.preorder()
        row = {key: n for n, key in enumerate(order)}
        inner = {nodes.parent[key] for key in order}
        for i, key in enumerate(leaf_keys):
            if key in inner or key in leaf_keys[:i]:
                raise ValueError(
                    f"leaf {i} ends in node {key}, which other leaves pass through or end in; give "
                    "each leaf a last node of its own (TreePO's sampler does)"
                )
        lengths = [nodes.ids[key].numel() for key in order]
        if sum(lengths) > _INT32:
            raise ValueError(f"a tree of {sum(lengths)} tokens is more than row numbers hold")
        group_id = group.trajectories[0].group_id
        return PackedTree(
            tokens=torch.cat([nodes.ids[key] for key in order]),
            tok_off=torch.tensor([0, *itertools.accumulate(lengths)]),
            parent=torch.tensor([row.get(nodes.parent[key], -1) for key in order]),
            node_id=torch.tensor([key if key >= 0 else -1 for key in order]),
            logp=torch.cat([nodes.logp[key] for key in order]),
            leaf_node=torch.tensor([row[key] for key in leaf_keys]),
            group_id=group_id,
        )

    @property
    def num_nodes(self) -> int:
        return self.parent.numel()

    @property
    def num_leaves(self) -> int:
        return self.leaf_node.numel()

    @property
    def num_tokens(self) -> int:
        """U, the prompt's included."""
        return self.tokens.numel()

    @property
    def prompt_length(self) -> int:
        return int(self.tok_off[1])

    @property
    def response_tokens(self) -> int:
        """Unique tokens behind the prompt."""
        return self.num_tokens - self.prompt_length

    @cached_property
    def lengths(self) -> Tensor:
        """[N], tokens of each node."""
        return self.tok_off.diff()

    @cached_property
    def depth(self) -> Tensor:
        """[N], segments from the root to the end of each node."""
        depth = [0] * self.num_nodes
        for node, parent in enumerate(self.parent.tolist()):
            depth[node] = depth[parent] + 1 if parent >= 0 else 0
        return torch.tensor(depth)

    @cached_property
    def start_pos(self) -> Tensor:
        """[N], tokens of the path before each node."""
        start, lengths = [0] * self.num_nodes, self.lengths.tolist()
        for node, parent in enumerate(self.parent.tolist()):
            start[node] = start[parent] + lengths[parent] if parent >= 0 else 0
        return torch.tensor(start)

    @cached_property
    def subtree_end(self) -> Tensor:
        """[N], row behind the last descendant of each node."""
        end = list(range(1, self.num_nodes + 1))
        parents = self.parent.tolist()
        for node in range(self.num_nodes - 1, 0, -1):
            end[parents[node]] = max(end[parents[node]], end[node])
        return torch.tensor(end)

    @cached_property
    def leaf_order(self) -> Tensor:
        """[W], leaves from the first to the last in depth-first order."""
        return self.leaf_node.argsort()

    @cached_property
    def leaf_ranges(self) -> Tensor:
        """[N, 2], first and behind the last place in ``leaf_order`` of the leaves of each node."""
        is_leaf = torch.bincount(self.leaf_node, minlength=self.num_nodes)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), is_leaf.cumsum(0)])
        return torch.stack([before[:-1], before[self.subtree_end]], dim=1)

    @cached_property
    def n_leaf(self) -> Tensor:
        """[N], leaves below (or at) each node."""
        return self.leaf_ranges[:, 1] - self.leaf_ranges[:, 0]

    @cached_property
    def num_children(self) -> Tensor:
        """[N]"""
        return torch.bincount(self.parent[1:], minlength=self.num_nodes)

    @cached_property
    def path_len(self) -> Tensor:
        """[W], tokens of each leaf's path, prompt and response."""
        return (self.start_pos + self.lengths)[self.leaf_node]

    @cached_property
    def paths(self) -> list[list[int]]:
        """[W], rows of the nodes from the root to each leaf."""
        parents, paths = self.parent.tolist(), []
        for node in self.leaf_node.tolist():
            path = [node]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            paths.append(path[::-1])
        return paths

    @cached_property
    def leaf_path(self) -> Tensor:
        """[S], indices of ``tokens`` leaf by leaf: ``tokens[leaf_path]`` are the flat sequences,
        ``path_len`` their lengths."""
        first = self.tok_off.tolist()
        pieces = [torch.arange(first[n], first[n + 1]) for path in self.paths for n in path]
        return torch.cat(pieces)

    @property
    def num_flat_tokens(self) -> int:
        """S: what separate sequences would hold."""
        return int(self.path_len.sum())

    @cached_property
    def leaf_weight(self) -> Tensor:
        """float64 [W], product over the forks of a leaf's path of 1 / (branches); they add up to 1.

        What is multiplied while a tree branches counts for one here. Without fallback the weighted
        mean over leaves has the mean of independent rollouts, the plain one favours long paths.
        """
        weight = torch.ones(self.num_nodes, dtype=torch.float64)
        children = self.num_children.double()
        for node, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                weight[node] = weight[parent] / children[parent]
        return weight[self.leaf_node]

    def split(self, node: int, k: int) -> PackedTree:
        """The same leaves with ``node`` cut after ``k`` of its tokens into parent and child."""
        if not 0 < node < self.num_nodes:
            raise ValueError(
                f"split({node}, {k}) needs a node from 1 to {self.num_nodes - 1}; the prompt, node "
                "0, is never cut"
            )
        length = int(self.lengths[node])
        if not 0 < k < length:
            raise ValueError(f"split({node}, {k}) needs a place inside the node's {length} tokens")
        cut = node + 1
        moved = self.parent + (self.parent >= node).long()  # what hung on the node hangs on its end
        names = self.node_id + (self.node_id > self.node_id[node]).long()
        own = names[node] + 1
        return replace(
            self,
            tok_off=torch.cat(
                [self.tok_off[:cut], self.tok_off[node, None] + k, self.tok_off[cut:]]
            ),
            parent=torch.cat([moved[:cut], torch.tensor([node]), moved[cut:]]),
            node_id=torch.cat([names[:cut], own[None], names[cut:]]),
            leaf_node=self.leaf_node + (self.leaf_node >= node).long(),
        )


class _Nodes:
    """Nodes by key while the leaves of a group are read; -1 is the root."""

    def __init__(self, prompt_ids: Tensor) -> None:
        nothing = torch.full(prompt_ids.shape, float("nan"))
        self.ids: dict[int, Tensor] = {-1: prompt_ids}
        self.logp: dict[int, Tensor] = {-1: nothing}
        self.parent: dict[int, int] = {-1: -2}

    def add(self, leaf: int, trajectory: Trajectory) -> int:
        """Takes up the nodes of a leaf; the key of its last one."""
        path, lengths = _checked_path(leaf, trajectory)
        if not torch.equal(trajectory.prompt_ids, self.ids[-1]):
            raise ValueError(f"leaf {leaf} has another prompt than its group")
        recorded = trajectory.logp_rollout
        count = trajectory.response_length
        if recorded is None:
            recorded = torch.full((count,), float("nan"))
        # flat rollouts have no names; no sampler numbers nodes from here on
        path = path or (_INT32 + leaf,)
        ids = trajectory.response_ids.split(lengths)
        logp = recorded[:count].split(lengths)
        parent = -1
        for key, own_ids, own_logp in zip(path, ids, logp, strict=True):
            if key not in self.ids:
                self.ids[key], self.logp[key], self.parent[key] = own_ids, own_logp, parent
            elif self.parent[key] != parent:
                raise ValueError(
                    f"leaf {leaf} reaches node {key} from node {parent}, another leaf from node "
                    f"{self.parent[key]} (-1: the prompt); a node has one parent"
                )
            elif not torch.equal(self.ids[key], own_ids):
                raise ValueError(
                    f"leaf {leaf} and another one share node {key}, but not its tokens: "
                    f"{own_ids.tolist()[:8]} against {self.ids[key].tolist()[:8]}"
                )
            elif not torch.equal(self.logp[key].nan_to_num(1.0), own_logp.nan_to_num(1.0)):
                raise ValueError(
                    f"leaf {leaf} and another one share node {key}, but not the log-probabilities "
                    "recorded there; record each token once, when it is drawn"
                )
            parent = key
        return parent

    def preorder(self) -> list[int]:
        """Keys, depth first, children in order of creation."""
        children: dict[int, list[int]] = {}
        for key in sorted(self.ids, reverse=True):
            children.setdefault(self.parent[key], []).append(key)
        order, stack = [], [-1]
        while stack:
            order.append(stack.pop())
            stack += children.get(order[-1], [])
        return order


def _checked_path(leaf: int, trajectory: Trajectory) -> tuple[tuple[int, ...], list[int]]:
    path, lengths = trajectory.node_path, trajectory.node_lengths
    count = trajectory.response_length
    if not path:
        return (), [count]
    if len(path) != len(lengths) or min(lengths) < 0 or sum(lengths) != count:
        raise ValueError(
            f"leaf {leaf} has node_path {path} and node_lengths {lengths} for {count} response "
            "tokens; it needs one length per node, and they add up to the response"
        )
    if path[0] < 0 or path[-1] >= _INT32 or any(a >= b for a, b in itertools.pairwise(path)):
        raise ValueError(
            f"leaf {leaf} has node_path {path}; nodes are numbered from 0 in order of creation, so "
            "numbers rise along a path"
        )
    return path, list(lengths)


@dataclass(frozen=True, kw_only=True, eq=False)
class Forest:
    """Trees behind each other, for one pass over all of them; integers are int64."""

    trees: tuple[PackedTree, ...]
    parent: Tensor
    """[N], -1 for roots"""
    depth: Tensor
    """[N]"""
    lengths: Tensor
    """[N], tokens of each node"""
    leaf_ranges: Tensor
    """[N, 2], places in ``leaf_order``"""
    leaf_node: Tensor
    """[W]"""
    leaf_order: Tensor
    """[W], leaves in depth-first order"""
    tree_of_leaf: Tensor
    """[W]"""
    first_node: Tensor
    """[T+1], first node of each tree"""
    first_token: Tensor
    """[T+1], first token of each tree"""

    @staticmethod
    def of(trees: Sequence[PackedTree]) -> Forest:
        """Of trees, in this order; their leaves count on."""
        nodes = _offsets([tree.num_nodes for tree in trees])
        leaves = _offsets([tree.num_leaves for tree in trees])

        def joined(name: str, offsets: Tensor | None = None) -> Tensor:
            parts = [getattr(tree, name) for tree in trees]
            if offsets is not None:
                parts = [
                    torch.where(part >= 0, part + first, part)
                    for part, first in zip(parts, offsets[:-1], strict=True)
                ]
            return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

        ranges = joined("leaf_ranges", leaves)
        return Forest(
            trees=tuple(trees),
            parent=joined("parent", nodes),
            depth=joined("depth"),
            lengths=joined("lengths"),
            leaf_ranges=ranges.view(-1, 2),
            leaf_node=joined("leaf_node", nodes),
            leaf_order=joined("leaf_order", leaves),
            tree_of_leaf=torch.arange(len(trees)).repeat_interleave(leaves.diff()),
            first_node=nodes,
            first_token=_offsets([tree.num_tokens for tree in trees]),
        )

    @property
    def num_nodes(self) -> int:
        return self.parent.numel()

    @property
    def num_leaves(self) -> int:
        return self.leaf_node.numel()

    @cached_property
    def n_leaf(self) -> Tensor:
        """[N], leaves below (or at) each node."""
        return self.leaf_ranges[:, 1] - self.leaf_ranges[:, 0]

    @cached_property
    def levels(self) -> list[Tensor]:
        """Nodes of each depth, roots first."""
        deepest = int(self.depth.max()) if self.num_nodes else -1
        return [(self.depth == d).nonzero()[:, 0] for d in range(deepest + 1)]

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """[Q] leaf and [Q] node: each leaf with each node of its path but the root."""
        leaves, nodes = [], []
        leaf, node = torch.arange(self.num_leaves), self.leaf_node
        while leaf.numel():
            below = self.parent[node] >= 0
            leaf, node = leaf[below], node[below]
            leaves.append(leaf)
            nodes.append(node)
            node = self.parent[node]
        empty = torch.zeros(0, dtype=torch.int64)
        return torch.cat([empty, *leaves]), torch.cat([empty, *nodes])

    @cached_property
    def logp(self) -> Tensor:
        """float32 [U], as recorded."""
        return torch.cat([torch.zeros(0), *(tree.logp for tree in self.trees)])

    @cached_property
    def node_of_token(self) -> Tensor:
        """[U]"""
        return torch.arange(self.num_nodes).repeat_interleave(self.lengths)


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int64)
