"""Trees made from rollouts: invariants, splitting, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from tree_toys import figure_3, group, leaf, random_group, tree_group

from dlm_fast.ops import Visibility
from dlm_fast.rollout import tree as tree_module
from dlm_fast.rollout.tree import Forest, PackedTree


def check(tree, members):
    """What must hold of any tree of these rollouts."""
    parent, lengths = tree.parent.tolist(), tree.lengths.tolist()
    assert all(p < n for n, p in enumerate(parent)) and parent.count(-1) == 1
    for node in range(1, tree.num_nodes):
        above = parent[node]
        assert tree.start_pos[node] == tree.start_pos[above] + lengths[above]
        assert tree.depth[node] == tree.depth[above] + 1
        below = {n for n in range(tree.num_nodes) if node in ancestors(parent, n)}
        assert below == set(range(node, int(tree.subtree_end[node])))
    assert int((tree.lengths * tree.n_leaf).sum()) == tree.num_flat_tokens
    assert int(tree.n_leaf[0]) == tree.num_leaves == len(members)
    flat = tree.tokens[tree.leaf_path].split(tree.path_len.tolist())
    recorded = tree.logp[tree.leaf_path].split(tree.path_len.tolist())
    for ids, logp, member in zip(flat, recorded, members, strict=True):
        assert torch.equal(ids, member.input_ids)
        assert logp[: member.prompt_length].isnan().all()
        assert torch.equal(logp[member.prompt_length :], member.logp_rollout)
    for node, (low, high) in enumerate(tree.leaf_ranges.tolist()):
        here = {i for i, path in enumerate(tree.paths) if node in path}
        assert set(tree.leaf_order[low:high].tolist()) == here
    assert float(tree.leaf_weight.sum()) == pytest.approx(1)


def ancestors(parent, node):
    path = [node]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return path


@settings(max_examples=60, deadline=None)
@given(seed=integers(0, 10**6))
def test_invariants(seed):
    members = random_group(seed)
    check(PackedTree.of(members), members.trajectories)


@settings(max_examples=30, deadline=None)
@given(seed=integers(0, 10**6), choice=integers(0, 10**6))
def test_split_changes_no_leaf(seed, choice):
    members = random_group(seed)
    tree = PackedTree.of(members)
    long = [n for n in range(1, tree.num_nodes) if tree.lengths[n] > 1]
    if not long:
        return
    node = long[choice % len(long)]
    cut = tree.split(node, 1 + choice % (int(tree.lengths[node]) - 1))
    check(cut, members.trajectories)
    assert cut.num_tokens == tree.num_tokens and cut.num_nodes == tree.num_nodes + 1
    assert torch.equal(cut.n_leaf[: node + 1], tree.n_leaf[: node + 1])
    assert sorted(cut.node_id.tolist()) == cut.node_id.sort().values.tolist()
    assert len(set(cut.node_id.tolist())) == cut.num_nodes


def test_figure_3():
    tree = PackedTree.of(figure_3())
    assert tree.node_id.tolist() == [-1, 0, 1, 2, 3, 5, 6, 4, 7, 8, 9, 10]
    assert tree.n_leaf.tolist() == [8, 1, 1, 6, 2, 1, 1, 3, 1, 1, 1, 1]
    assert tree.num_flat_tokens == 56 + 8 * 3
    weights = [1 / 3, 1 / 3, 1 / 18, 1 / 18, 1 / 27, 1 / 27, 1 / 27, 1 / 9]
    assert tree.leaf_weight.tolist() == pytest.approx(weights)


def test_order_is_that_of_the_tree_attention():
    """Tokens as they stand are the pack of ``Visibility.tree``."""
    tree = PackedTree.of(random_group(7))
    visibility = Visibility.tree(tree.parent.tolist(), tree.lengths.tolist())
    position = tree.start_pos.repeat_interleave(tree.lengths)
    offset = torch.arange(tree.num_tokens) - tree.tok_off[:-1].repeat_interleave(tree.lengths)
    assert torch.equal(visibility.position_ids, position + offset)


def test_flat_rollouts_are_a_star():
    members = group([leaf((), (), [10, 11]), leaf((), (), [10, 12, 13])])
    tree = PackedTree.of(members)
    check(tree, members.trajectories)
    assert tree.parent.tolist() == [-1, 0, 0] and tree.num_tokens == 3 + 5
    assert tree.leaf_weight.tolist() == [0.5, 0.5]


def test_equal_siblings_stay_apart():
    tree = PackedTree.of(tree_group([-1, -1], [[10], [10]], [0, 1], [0, 1]))
    assert tree.num_nodes == 3 and tree.num_tokens == 5


def test_forests_join_trees():
    groups = [random_group(seed, group_id=seed) for seed in range(4)]
    forest = Forest.of([PackedTree.of(g) for g in groups])
    assert forest.num_leaves == sum(len(g.trajectories) for g in groups)
    leaf_Q, node_Q = forest.pairs
    of_pairs = torch.zeros(forest.num_nodes).index_add_(0, node_Q, torch.ones(len(node_Q)))
    inner = forest.parent >= 0
    assert torch.equal(of_pairs[inner].long(), forest.n_leaf[inner])
    lengths = torch.zeros(forest.num_leaves, dtype=torch.int64)
    lengths.index_add_(0, leaf_Q, forest.lengths[node_Q])
    expected = [t.response_length for g in groups for t in g.trajectories]
    assert lengths.tolist() == expected
    assert forest.first_token.tolist()[-1] == forest.node_of_token.numel()
    nothing = Forest.of([])
    assert nothing.num_leaves == 0 and nothing.pairs[0].numel() == 0 and nothing.levels == []


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ([], "no rollouts"),
        ([((0, 1), (1, 1), [10, 11]), ((0, 2), (1, 1), [12, 11])], "not its tokens"),
        ([((0, 1), (1, 1), [10, 11]), ((0, 2), (2, 1), [10, 11, 12])], "not its tokens"),
        ([((0, 2), (1, 1), [10, 11]), ((1, 2), (1, 1), [10, 11])], "one parent"),
        ([((0, 1), (1, 1), [10, 11]), ((0,), (1,), [10])], "last node of its own"),
        ([((0,), (1,), [10]), ((0,), (1,), [10])], "last node of its own"),
        ([((1, 0), (1, 1), [10, 11])], "rise along a path"),
        ([((0, 1), (1, 2), [10, 11])], "add up to the response"),
        ([((0, 1), (2,), [10, 11])], "one length per node"),
        ([((0, 1), (3, -1), [10, 11])], "add up to the response"),
    ],
)
def test_contradictions_are_refused(leaves, words):
    members = [leaf(*entry) for entry in leaves]
    made = group(members) if members else figure_3()
    if not members:
        made.trajectories = []
    with pytest.raises(ValueError, match=words):
        PackedTree.of(made)


def test_other_prompts_and_other_records_are_refused():
    made = group([leaf((0, 1), (1, 1), [10, 11]), leaf((0, 2), (1, 1), [10, 12])])
    made.trajectories[1].logp_rollout = made.trajectories[1].logp_rollout + 0.1
    with pytest.raises(ValueError, match="log-probabilities"):
        PackedTree.of(made)
    made = group([leaf((), (), [10]), leaf((), (), [10], prompt=(4,))])
    with pytest.raises(ValueError, match="leaf 1 has another prompt"):
        PackedTree.of(made)


@pytest.mark.parametrize(("node", "k"), [(0, 1), (1, 0), (1, 9), (99, 1), (-1, 1)])
def test_impossible_splits_are_refused(node, k):
    tree = PackedTree.of(figure_3())
    with pytest.raises(ValueError, match=r"split\("):
        if node == 99:
            node = tree.num_nodes
        tree.split(node, k)


def test_too_many_tokens_are_refused(monkeypatch):
    monkeypatch.setattr(tree_module, "_INT32", 50)
    with pytest.raises(ValueError, match="more than row numbers hold"):
        PackedTree.of(figure_3((20, 20, 20, 20, 20, 20, 20, 20)))
