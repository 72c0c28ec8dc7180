"""How much better than those it shares prefixes with a leaf of a tree of rollouts is.

Leaf i with reward R_i; G_ij the leaves that share its first j segments (j = 0: the whole tree).
Terms are kept for j = 0, and for 1 <= j < ``max_group_depth`` where |G_ij| > 1:

    A_ij = R_i - mean of R over G_ij            a tree of one leaf: A_i0 = R_i
    mean      A_i = mean over j of A_ij         size      A_i = sum |G_ij| A_ij / sum |G_ij|
    no_root   mean without j = 0                rfpp      A_i0
    grpo      A_i0 / (std of the tree + 1e-6)   rloo      A_i0 n / (n - 1)

``progress`` and ``sibling_loo`` give each segment its own number, from values V of nodes:

    progress      V(leaf) = sum |G| (R - mean_G) / sum |G| over its whole path, itself included;
                  V(node) = mean of V(children), V(root) = 0;
                  A(segment k of J) = V(node_k) - eta^(J+1-k) V(parent), no eta if eta <= 0
    sibling_loo   V(leaf) = R, V(node) = mean of V(children); A(node) = V(node) - mean V(siblings)

Then ``whiten`` over the whole batch: token: less the mean over response tokens, over their standard
deviation; std: over that of the terms A_ij, without a shift (the paper's equation 5); none.
Sources: TreePO, arXiv 2508.17445, and its open trainer (token, size, progress); grpo: arXiv
2402.03300; rloo: arXiv 2402.14740; rfpp: REINFORCE++, arXiv 2501.03262; sibling_loo: d-TreeRPO,
arXiv 2512.09675.

Letters: ``N`` nodes, ``W`` leaves, ``Q`` pairs of a leaf and a node of its path (``Forest.pairs``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlm_fast.algorithms.advantages import group_advantage
from dlm_fast.rollout.tree import Forest

Estimator = Literal["mean", "size", "no_root", "grpo", "rloo", "rfpp", "progress", "sibling_loo"]
Whiten = Literal["default", "token", "std", "none"]

OF_GROUPS = ("mean", "size", "no_root")
"""estimators that average terms over the groups of a leaf"""
_VARIANCE_FLOOR = 1e-8
_MAX_GROUP_DEPTH = 14


@dataclass(frozen=True, kw_only=True)
class AdvantageOptions:
    """How leaves are compared."""

    estimator: Estimator = "mean"
    """mean, size, no_root: over the groups of leaves with a common prefix (TreePO). grpo, rloo,
    rfpp: over the prompt's rollouts alone. progress, sibling_loo: one number per segment"""
    whiten: Whiten = "default"
    """token: standardised over all response tokens of the iteration. std: divided by the standard
    deviation of the groups' terms (mean, size, no_root only). none. default: token, but none for
    grpo, rloo and sibling_loo"""
    max_group_depth: int = _MAX_GROUP_DEPTH
    """groups that share so many segments or more are left out"""
    reject_flat: bool = False
    """groups of equal rewards below the root are left out (the paper finds that it hurts)"""
    unique_groups: bool = False
    """a chain of nodes with the same leaves counts once, not once per segment"""
    eta: float = 0.0
    """damping of ``progress`` per segment; 0: none"""

    def __post_init__(self) -> None:
        if self.max_group_depth < 1:
            raise ValueError(
                f"algorithm.max_group_depth must be at least 1, got {self.max_group_depth}"
            )
        if self.whiten == "std" and self.estimator not in OF_GROUPS:
            raise ValueError(
                f"algorithm.whiten=std divides by the deviation of the terms of "
                f"{', '.join(OF_GROUPS)}; algorithm.estimator={self.estimator} has none: take "
                "token or none"
            )
        if not -float("inf") < self.eta <= 1:
            raise ValueError(f"algorithm.eta must be at most 1, got {self.eta}")

    @property
    def normaliser(self) -> Whiten:
        """``whiten`` with its default resolved."""
        if self.whiten != "default":
            return self.whiten
        return "none" if self.estimator in ("grpo", "rloo", "sibling_loo") else "token"


def tree_advantages(
    forest: Forest,
    reward_W: Tensor,
    options: AdvantageOptions,
    token_count_Q: Tensor | None = None,
    global_sum: Callable[[float], float] = lambda value: value,
) -> Tensor:
    """float64 [Q]: the advantage of each leaf in each segment of its path.

    ``token_count_Q``: tokens that carry each number, for ``whiten=token``; by default all of the
    segment. ``global_sum`` adds over processes, where trees lie on several (called as often on
    each, whatever its trees). ValueError names a leaf whose reward is missing or not finite.
    """
    reward_W = checked_rewards(forest, reward_W)
    leaf_Q, node_Q = forest.pairs
    if token_count_Q is None:
        token_count_Q = forest.lengths[node_Q]
    groups = _Groups.of(forest, reward_W, options)
    if options.estimator == "progress":
        advantage_Q = _progress(forest, groups, options.eta)
    elif options.estimator == "sibling_loo":
        advantage_Q = _sibling_loo(forest, reward_W)[node_Q]
    elif options.estimator in ("grpo", "rloo"):
        baseline: Literal["std", "leave_one_out"] = (
            "std" if options.estimator == "grpo" else "leave_one_out"
        )
        of_trees = reward_W.split([tree.num_leaves for tree in forest.trees])
        advantage_W = [group_advantage(reward, baseline) for reward in of_trees]
        advantage_Q = torch.cat([reward_W[:0], *advantage_W])[leaf_Q]
    else:
        advantage_Q = groups.average(forest, options.estimator)[leaf_Q]
    if options.normaliser == "token":
        return whitened(advantage_Q, token_count_Q, global_sum)
    if options.normaliser == "std":
        return _over_std_of_terms(advantage_Q, groups, forest, options.estimator, global_sum)
    return advantage_Q


def checked_rewards(forest: Forest, reward_W: Tensor) -> Tensor:
    """float64 [W]."""
    reward_W = torch.as_tensor(reward_W, dtype=torch.float64)
    if reward_W.shape != (forest.num_leaves,):
        raise ValueError(
            f"{list(reward_W.shape)} rewards for trees of {forest.num_leaves} leaves; each leaf "
            "needs one"
        )
    bad = (~reward_W.isfinite()).nonzero()[:, 0]
    if bad.numel():
        leaf = int(bad[0])
        tree = int(forest.tree_of_leaf[leaf])
        own = leaf - int((forest.tree_of_leaf < tree).sum())
        raise ValueError(
            f"leaf {own} of the tree of group {forest.trees[tree].group_id} has reward "
            f"{reward_W[leaf].item()}; an unscored rollout has NaN: score all of them, or look at "
            "the task's checker"
        )
    return reward_W


@dataclass(kw_only=True, eq=False)
class _Groups:
    """Sums over the groups of each leaf, gathered from the root downwards in one pass."""

    reward_W: Tensor
    """less that of the tree's first leaf"""
    mean_N: Tensor
    """mean reward of the leaves of each node; 0 where a tree has but one"""
    count_N: Tensor
    """kept groups on the path to each node, itself included"""
    mean_sum_N: Tensor
    square_sum_N: Tensor
    """of means, and of their squares, over the same groups"""
    size_sum_N: Tensor
    reward_sum_N: Tensor
    """leaves, and their rewards, added up over the same groups"""

    @staticmethod
    def of(forest: Forest, reward_W: Tensor, options: AdvantageOptions) -> _Groups:
        low, high = forest.leaf_ranges.unbind(1)
        # terms do not change with it, and equal rewards, whose mean may differ from them in the
        # last digit, give exactly 0
        reward_W = reward_W - _reward_of_first_leaf(forest, reward_W)
        ordered_W = reward_W[forest.leaf_order]
        # every node's leaves are one range, so one prefix sum serves all groups
        before = torch.cat([ordered_W.new_zeros(1), ordered_W.cumsum(0)])
        size_N = (high - low).double()
        sum_N = before[high] - before[low]
        mean_N = sum_N / size_N
        is_root_N = forest.parent < 0
        alone_N = is_root_N & (size_N == 1)
        mean_N, sum_N = mean_N.masked_fill(alone_N, 0.0), sum_N.masked_fill(alone_N, 0.0)
        kept_N = (size_N > 1) & (forest.depth < options.max_group_depth)
        if options.reject_flat:
            kept_N &= ~_flat(ordered_W, low, high)
        if options.unique_groups:
            kept_N &= is_root_N | (size_N != size_N[forest.parent.clamp(min=0)])
        kept_N = is_root_N if options.estimator == "rfpp" else kept_N | is_root_N
        if options.estimator == "no_root":
            kept_N = kept_N & ~is_root_N
        running = [
            _down(forest, torch.where(kept_N, own, 0.0))
            for own in (torch.ones_like(mean_N), mean_N, mean_N.square(), size_N, sum_N)
        ]
        names = ("count_N", "mean_sum_N", "square_sum_N", "size_sum_N", "reward_sum_N")
        sums = dict(zip(names, running, strict=True))
        return _Groups(reward_W=reward_W, mean_N=mean_N, **sums)

    def average(self, forest: Forest, estimator: Estimator) -> Tensor:
        """float64 [W]: A_i."""
        leaf = forest.leaf_node
        if estimator == "size":
            return self.reward_W - self.reward_sum_N[leaf] / self.size_sum_N[leaf]
        count_W = self.count_N[leaf]
        average_W = self.reward_W - self.mean_sum_N[leaf] / count_W.clamp(min=1)
        return torch.where(count_W > 0, average_W, 0.0)


def _reward_of_first_leaf(forest: Forest, reward_W: Tensor) -> Tensor:
    """[W], of the same tree; 0 in trees of one leaf, which are compared with nothing."""
    leaves = torch.bincount(forest.tree_of_leaf, minlength=len(forest.trees))
    first = reward_W[(leaves.cumsum(0) - leaves)[forest.tree_of_leaf]]
    return torch.where(leaves[forest.tree_of_leaf] > 1, first, 0.0)


def _flat(ordered_W: Tensor, low_N: Tensor, high_N: Tensor) -> Tensor:
    """bool [N]: all leaves of the node have one reward."""
    changes = torch.zeros_like(ordered_W, dtype=torch.int64)
    changes[1:] = (ordered_W[1:] != ordered_W[:-1]).long().cumsum(0)
    return changes[low_N] == changes[high_N - 1]


def _down(forest: Forest, value_N: Tensor) -> Tensor:
    """[N]: sums over the path from the root to each node, itself included."""
    total_N = value_N.clone()
    for nodes in forest.levels[1:]:
        total_N[nodes] += total_N[forest.parent[nodes]]
    return total_N


def _mean_of_children(forest: Forest, value_N: Tensor) -> Tensor:
    """[N]: values from the leaves up; those of inner nodes are the mean of their children's."""
    value_N = value_N.clone()
    children = torch.bincount(forest.parent[forest.parent >= 0], minlength=forest.num_nodes)
    for nodes in reversed(forest.levels[1:]):
        parent = forest.parent[nodes]
        value_N.index_add_(0, parent, value_N[nodes] / children[parent])
    return value_N


def _progress(forest: Forest, groups: _Groups, eta: float) -> Tensor:
    """float64 [Q]."""
    size_N = forest.n_leaf.double()
    leaf = forest.leaf_node
    # every group of the path counts here, those of one leaf too: their reward is the leaf's own
    size_W = _down(forest, size_N)[leaf]
    reward_W = _down(forest, size_N * groups.mean_N)[leaf]
    value_N = torch.zeros_like(groups.mean_N)
    value_N[leaf] = groups.reward_W - reward_W / size_W
    value_N = _mean_of_children(forest, value_N).masked_fill(forest.parent < 0, 0.0)
    leaf_Q, node_Q = forest.pairs
    factor_Q: Tensor | float = 1.0
    if eta > 0:
        factor_Q = eta ** (forest.depth[leaf][leaf_Q] + 1 - forest.depth[node_Q]).double()
    return value_N[node_Q] - factor_Q * value_N[forest.parent[node_Q]]


def _sibling_loo(forest: Forest, reward_W: Tensor) -> Tensor:
    """float64 [N]; roots have 0."""
    value_N = torch.zeros(forest.num_nodes, dtype=torch.float64)
    value_N[forest.leaf_node] = reward_W
    value_N = _mean_of_children(forest, value_N)
    nodes = (forest.parent >= 0).nonzero()[:, 0]
    parent = forest.parent[nodes]
    siblings = torch.bincount(parent, minlength=forest.num_nodes)[parent] - 1
    sum_N = torch.zeros_like(value_N).index_add_(0, parent, value_N[nodes])
    others = (sum_N[parent] - value_N[nodes]) / siblings.clamp(min=1)
    result = torch.zeros_like(value_N)
    result[nodes] = value_N[nodes] - torch.where(siblings > 0, others, 0.0)
    return result


def whitened(
    value_Q: Tensor,
    count_Q: Tensor,
    global_sum: Callable[[float], float] = lambda value: value,
) -> Tensor:
    """(value - mean) / sqrt(unbiased variance + 1e-8), each value counted ``count_Q`` times.

    0 where one token alone is counted, since its variance is undefined.
    """
    count = global_sum(float(count_Q.sum()))
    mean = global_sum(float((value_Q * count_Q).sum())) / max(count, 1.0)
    squares = global_sum(float(((value_Q - mean).square() * count_Q).sum()))
    if count < 2:
        return torch.zeros_like(value_Q)
    return (value_Q - mean) / (squares / (count - 1) + _VARIANCE_FLOOR) ** 0.5


def _over_std_of_terms(
    advantage_Q: Tensor,
    groups: _Groups,
    forest: Forest,
    estimator: Estimator,
    global_sum: Callable[[float], float],
) -> Tensor:
    leaf, reward_W = forest.leaf_node, groups.reward_W
    count_W, mean_W = groups.count_N[leaf], groups.mean_sum_N[leaf]
    count = global_sum(float(count_W.sum()))
    total = global_sum(float((count_W * reward_W - mean_W).sum()))
    squares_W = count_W * reward_W.square() - 2 * reward_W * mean_W + groups.square_sum_N[leaf]
    squares = global_sum(float(squares_W.sum()))
    variance = (squares - total * total / max(count, 1.0)) / max(count - 1, 1.0)
    # below rounding of the squares all terms are equal
    if count < 2 or variance <= 1e-14 * max(squares, 1e-300):
        return torch.zeros_like(advantage_Q)
    return advantage_Q / variance**0.5
