"""The definition of ``tree_advantages``: leaf by leaf, group by group, without sharing a sum."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from dlm_fast.algorithms.tree_advantages import OF_GROUPS, AdvantageOptions
from dlm_fast.rollout.tree import Forest, PackedTree

Pair = tuple[int, int, int]
"""tree, leaf, node"""


def tree_advantages_ref(forest: Forest, reward_W: Tensor, options: AdvantageOptions) -> Tensor:
    """float64 [Q], as ``tree_advantages`` has it for one process and whole segments."""
    rewards = [part.tolist() for part in reward_W.split([t.num_leaves for t in forest.trees])]
    found: dict[Pair, float] = {}
    terms: list[float] = []
    for number, (tree, reward) in enumerate(zip(forest.trees, rewards, strict=True)):
        for leaf, path in enumerate(tree.paths):
            own = _segments(tree, reward, leaf, options, terms)
            found |= {(number, leaf, node): a for node, a in zip(path[1:], own, strict=True)}
    counts = {(k, i, n): int(forest.trees[k].lengths[n]) for k, i, n in found}
    if options.normaliser == "token":
        values = [found[pair] for pair in found for _ in range(counts[pair])]
        mean = statistics.fmean(values) if values else 0.0
        spread = (statistics.variance(values) + 1e-8) ** 0.5 if len(values) > 1 else 0.0
        found = {pair: (a - mean) / spread if spread else 0.0 for pair, a in found.items()}
    elif options.normaliser == "std":
        spread = statistics.stdev(terms) if len(terms) > 1 else 0.0
        found = {pair: a / spread if spread > 1e-12 else 0.0 for pair, a in found.items()}
    first_leaf = [0]
    for tree in forest.trees:
        first_leaf.append(first_leaf[-1] + tree.num_leaves)
    result = []
    for leaf, node in zip(*(part.tolist() for part in forest.pairs), strict=True):
        number = int(forest.tree_of_leaf[leaf])
        pair = (number, leaf - first_leaf[number], node - int(forest.first_node[number]))
        result.append(found[pair])
    return torch.tensor(result, dtype=torch.float64)


def _segments(
    tree: PackedTree,
    reward: list[float],
    leaf: int,
    options: AdvantageOptions,
    terms: list[float],
) -> list[float]:
    """Advantage of each segment of a leaf; ``terms`` takes up those of its groups."""
    depth = len(tree.paths[leaf]) - 1
    if options.estimator == "progress":
        values = _progress_values(tree, reward)
        path = tree.paths[leaf]
        damped = [
            options.eta ** (depth + 1 - k) if options.eta > 0 else 1.0 for k in range(depth + 1)
        ]
        return [values[path[k]] - damped[k] * values[path[k - 1]] for k in range(1, depth + 1)]
    if options.estimator == "sibling_loo":
        return [_without_siblings(tree, reward, node) for node in tree.paths[leaf][1:]]
    whole = reward[leaf] - statistics.fmean(reward) if len(reward) > 1 else reward[leaf]
    if options.estimator == "rfpp":
        return [whole] * depth
    if options.estimator in ("grpo", "rloo"):
        if len(set(reward)) == 1:
            return [0.0] * depth
        n = len(reward)
        scale = n / (n - 1)
        if options.estimator == "grpo":
            scale = 1 / (statistics.stdev(reward) + 1e-6)
        return [whole * scale] * depth
    assert options.estimator in OF_GROUPS
    kept = [] if options.estimator == "no_root" else [(whole, len(reward))]
    before = set(range(len(reward)))
    for j in range(1, min(depth, options.max_group_depth - 1) + 1):
        group = _group(tree, leaf, j)
        members = [reward[i] for i in group]
        keep = len(group) > 1
        if options.reject_flat and len(set(members)) == 1:
            keep = False
        if options.unique_groups and group == before:
            keep = False
        if keep:
            kept.append((reward[leaf] - statistics.fmean(members), len(group)))
        before = group
    terms += [term for term, _ in kept]
    if not kept:
        return [0.0] * depth
    weights = [size if options.estimator == "size" else 1 for _, size in kept]
    total = sum(w * term for w, (term, _) in zip(weights, kept, strict=True))
    return [total / sum(weights)] * depth


def _group(tree: PackedTree, leaf: int, j: int) -> set[int]:
    """Leaves that share the first j segments of ``leaf``."""
    prefix = tree.paths[leaf][: j + 1]
    return {i for i, path in enumerate(tree.paths) if path[: j + 1] == prefix}


def _children(tree: PackedTree, node: int) -> list[int]:
    return (tree.parent == node).nonzero()[:, 0].tolist()


def _value(tree: PackedTree, node: int, of_leaf: list[float]) -> float:
    children = _children(tree, node)
    if not children:
        return of_leaf[tree.leaf_node.tolist().index(node)]
    return statistics.fmean(_value(tree, child, of_leaf) for child in children)


def _progress_values(tree: PackedTree, reward: list[float]) -> list[float]:
    of_leaf = []
    for leaf, path in enumerate(tree.paths):
        total = size = 0.0
        for j in range(len(path)):
            members = [reward[i] for i in _group(tree, leaf, j)]
            mean = 0.0 if j == 0 and len(members) == 1 else statistics.fmean(members)
            total += len(members) * (reward[leaf] - mean)
            size += len(members)
        of_leaf.append(total / size)
    return [0.0, *(_value(tree, node, of_leaf) for node in range(1, tree.num_nodes))]


def _without_siblings(tree: PackedTree, reward: list[float], node: int) -> float:
    siblings = [n for n in _children(tree, int(tree.parent[node])) if n != node]
    others = [_value(tree, n, reward) for n in siblings]
    return _value(tree, node, reward) - (statistics.fmean(others) if others else 0.0)
