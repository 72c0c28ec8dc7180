"""Advantages of trees: the worked example, the definition, and what must hold of any tree."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from
from tree_toys import figure_3, group, leaf, random_group, tree_group

from dlm_fast.algorithms.tree_advantages import AdvantageOptions, tree_advantages, whitened
from dlm_fast.algorithms.tree_advantages_ref import tree_advantages_ref
from dlm_fast.rollout.tree import Forest, PackedTree

ESTIMATORS = ("mean", "size", "no_root", "grpo", "rloo", "rfpp", "progress", "sibling_loo")
OPTIONS = [
    AdvantageOptions(estimator=estimator, whiten=whiten, **more)
    for estimator in ESTIMATORS
    for whiten in ("token", "std", "none")
    for more in (
        {},
        {"reject_flat": True},
        {"unique_groups": True},
        {"max_group_depth": 2},
        {"eta": 0.7},
    )
    if whiten != "std" or estimator in ("mean", "size", "no_root")
    if "eta" not in more or estimator == "progress"
]


def forest_of(*groups):
    return Forest.of([PackedTree.of(made) for made in groups])


def rewards_of(*groups):
    return torch.cat([made.rewards for made in groups])


def of_leaves(forest, advantage_Q):
    """[W] of estimators with one number per leaf."""
    leaf_Q, _ = forest.pairs
    found = torch.full((forest.num_leaves,), float("nan"), dtype=torch.float64)
    found[leaf_Q] = advantage_Q
    assert torch.equal(found[leaf_Q], advantage_Q)
    return found


def figure(**options):
    made = figure_3()
    forest = forest_of(made)
    options = AdvantageOptions(**options)
    found = of_leaves(forest, tree_advantages(forest, made.rewards, options))
    return found.tolist()


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("mean", [-0.75, 1.25, -0.4722, -0.4722, 1.0833, 1.0833, -0.9167, -0.7083]),
        ("size", [-0.75, 1.25, -0.6250, -0.6250, 1.1765, 1.1765, -0.8235, -0.7143]),
        ("no_root", [0, 0, -0.3333, -0.3333, 1.0, 1.0, -1.0, -0.6667]),
        ("rfpp", [-0.75, 1.25, -0.75, -0.75, 1.25, 1.25, -0.75, -0.75]),
    ],
)
def test_figure_3_of_the_paper(estimator, expected):
    """Its c term of c22 is printed as 1.125; the right value is 4/3."""
    assert figure(estimator=estimator, whiten="none") == pytest.approx(expected, abs=5e-5)


def test_terms_of_figure_3():
    """With groups up to depth j only, sums of terms follow; c22 has 5/4, 4/3 and 2/3."""
    terms = []
    for depth in (1, 2, 3):
        mean = figure(estimator="mean", whiten="none", max_group_depth=depth)
        terms.append([round(a * min(depth, 3), 4) for a in (mean[5], mean[2])])
    assert terms == [[1.25, -0.75], [2.5833, -1.4167], [3.25, -1.4167]]


def test_token_whitening_of_figure_3():
    found = figure(estimator="mean", whiten="token")
    c1, c21 = -0.5397, 1.2143
    expected = [-0.8530, 1.4022, c1, c1, c21, c21, -1.0409, -0.8060]
    assert found == pytest.approx(expected, abs=5e-5)
    bare = torch.tensor(figure(estimator="mean", whiten="none"), dtype=torch.float64)
    lengths = torch.tensor([3, 5, 8, 8, 7, 9, 10, 6])
    tokens = bare.repeat_interleave(lengths)
    assert lengths.sum() == 56
    assert float(tokens.mean()) == pytest.approx(0.0064484, abs=5e-8)
    assert float(tokens.var()) == pytest.approx(0.7864826, abs=5e-8)


def test_whitening_over_terms_of_figure_3():
    found = figure(estimator="mean", whiten="std")
    assert found[5] == pytest.approx(1.1674, abs=5e-5)
    assert found[0] == pytest.approx(-0.8082, abs=5e-5)
    bare = figure(estimator="mean", whiten="none")
    assert bare[5] / found[5] == pytest.approx(0.9279607, abs=5e-8)


def test_progress_of_figure_3():
    """V(c22) = 20/18, so its last segment has 20/18 - V(c2)."""
    made = figure_3()
    forest = forest_of(made)
    options = AdvantageOptions(estimator="progress", whiten="none")
    found = tree_advantages(forest, made.rewards, options)
    leaf_Q, node_Q = forest.pairs
    tree = forest.trees[0]
    number = {
        int(tree.node_id[n]): a
        for i, n, a in zip(leaf_Q.tolist(), node_Q.tolist(), found.tolist(), strict=True)
        if i == 5
    }
    assert sum(number.values()) == pytest.approx(20 / 18)  # from root value 0 to the leaf's
    assert round(20 / 18, 4) == 1.1111
    value_c23 = (8 * -0.75 + 6 * -2 / 3 + 3 * -4 / 3) / 18
    assert number[8] == pytest.approx(20 / 18 - (2 * 20 / 18 + value_c23) / 3)


@settings(max_examples=80, deadline=None)
@given(seed=integers(0, 10**6), options=sampled_from(OPTIONS), flat=sampled_from([0, 0, 0, 1]))
def test_equals_the_definition(seed, options, flat):
    values = (0.1,) if flat else (-1.0, 0.1, 0.3, 1.0)
    groups = [
        random_group(seed + k, leaves=1 + (seed + 3 * k) % 9, group_id=k, rewards=values)
        for k in range(3)
    ]
    forest, reward_W = forest_of(*groups), rewards_of(*groups)
    found = tree_advantages(forest, reward_W, options)
    assert torch.allclose(found, tree_advantages_ref(forest, reward_W, options), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=integers(0, 10**6), estimator=sampled_from(ESTIMATORS))
def test_shift_scale_and_order(seed, estimator):
    made = random_group(seed, rewards=(-1.0, 0.25, 0.5, 1.0))
    if len(made.trajectories) < 2:
        return
    options = AdvantageOptions(estimator=estimator, whiten="none")

    def by_node(members, reward_W):
        forest = forest_of(members)
        leaf_Q, node_Q = forest.pairs
        names = forest.trees[0].node_id[node_Q].tolist()
        ends = [members.trajectories[i].node_path[-1] for i in leaf_Q.tolist()]
        found = tree_advantages(forest, reward_W, options).tolist()
        return dict(zip(zip(ends, names, strict=True), found, strict=True))

    plain = by_node(made, made.rewards)
    if estimator != "sibling_loo":  # an only child keeps its bare value
        shifted = by_node(made, made.rewards + 3)
        assert shifted == pytest.approx(plain, abs=1e-9)
    if estimator != "grpo":  # divides by a deviation
        scaled = by_node(made, 4 * made.rewards)
        assert scaled == pytest.approx({key: 4 * a for key, a in plain.items()}, abs=1e-9)
    order = torch.randperm(len(made.trajectories), generator=torch.Generator().manual_seed(seed))
    made.trajectories = [made.trajectories[i] for i in order.tolist()]
    assert by_node(made, made.rewards) == pytest.approx(plain, abs=1e-9)


def full_tree(branching, seed):
    """A tree whose nodes of one depth have as many children; leaves with rewards in 0..1."""
    parents, level = [], [-1]
    for width in branching:
        children = []
        for parent in level:
            for _ in range(width):
                parents.append(parent)
                children.append(len(parents) - 1)
        level = children
    draws = torch.rand(len(level), generator=torch.Generator().manual_seed(seed)).tolist()
    return tree_group(parents, [[10]] * len(parents), level, draws)


@pytest.mark.parametrize("branching", [(2, 2, 3), (3, 2, 2), (2, 4, 1), (5,)])
def test_terms_of_a_group_cancel(branching):
    """A_ij adds up to 0 over every group. Terms are differences of sums up to depth j."""
    made = full_tree(branching, seed=sum(branching))
    forest = forest_of(made)
    tree = forest.trees[0]
    before = torch.zeros(tree.num_leaves, dtype=torch.float64)
    for j in range(len(branching)):
        options = AdvantageOptions(whiten="none", max_group_depth=j + 1)
        advantage = of_leaves(forest, tree_advantages(forest, made.rewards, options))
        kept = j + 1 if branching != (2, 4, 1) else min(j + 1, 2)  # the last one is a leaf's own
        term, before = kept * advantage - before, kept * advantage
        for node in (tree.depth == j).nonzero()[:, 0].tolist():
            leaves = [i for i, path in enumerate(tree.paths) if node in path]
            assert float(term[leaves].sum()) == pytest.approx(0, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=integers(0, 10**6))
def test_advantages_of_full_trees_cancel(seed):
    """Where all leaves have as many terms."""
    made = full_tree([1 + (seed >> (2 * k)) % 3 for k in range(3)], seed)
    forest = forest_of(made)
    for estimator in ("mean", "size", "rfpp", "rloo", "no_root"):
        options = AdvantageOptions(estimator=estimator, whiten="none")
        found = of_leaves(forest, tree_advantages(forest, made.rewards, options))
        if forest.num_leaves > 1:
            assert float(found.sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_give_nothing(estimator):
    """Also where the mean of equal numbers is not that number."""
    for seed, whiten in itertools.product(range(5), ("token", "none")):
        made = random_group(seed, rewards=(0.1,))
        forest = forest_of(made)
        options = AdvantageOptions(estimator=estimator, whiten=whiten)
        found = tree_advantages(forest, made.rewards, options)
        if estimator != "sibling_loo" and len(made.trajectories) > 1:
            assert torch.count_nonzero(found) == 0


def test_a_star_has_the_baseline_of_its_prompt():
    made = group([leaf((), (), [10 + k] * (k + 1), reward=k % 3) for k in range(7)])
    forest = forest_of(made)
    found = {
        name: tree_advantages(forest, made.rewards, AdvantageOptions(estimator=name))
        for name in ("mean", "size", "rfpp")
    }
    assert torch.allclose(found["mean"], found["rfpp"])
    assert torch.allclose(found["size"], found["rfpp"])


def test_chains_count_once_per_segment_or_once():
    """Two leaves that share a chain of two segments behind a fork of the prompt."""
    parents, leaves = [-1, 0, 1, 1, -1], [2, 3, 4]
    made = tree_group(parents, [[10]] * 5, leaves, [1, 0, 0])
    forest = forest_of(made)

    def found(**options):
        options = AdvantageOptions(estimator="mean", whiten="none", **options)
        return of_leaves(forest, tree_advantages(forest, made.rewards, options)).tolist()

    assert found() == pytest.approx([1 - (1 / 3 + 1 / 2 + 1 / 2) / 3, -(4 / 3) / 3, -1 / 3])
    assert found(unique_groups=True) == pytest.approx([1 - 5 / 12, -5 / 12, -1 / 3])


def test_a_tree_of_one_leaf_keeps_its_reward():
    made = group([leaf((0, 1), (1, 2), [10, 11, 12], reward=0.5)])
    forest = forest_of(made)
    options = AdvantageOptions(estimator="mean", whiten="none")
    assert tree_advantages(forest, made.rewards, options).tolist() == [0.5, 0.5]
    for whiten in ("token", "std"):
        options = AdvantageOptions(estimator="mean", whiten=whiten)
        assert tree_advantages(forest, made.rewards, options).tolist() == [0, 0]


def test_one_token_has_no_variance():
    found = whitened(torch.tensor([2.0, 3.0]).double(), torch.tensor([1, 0]))
    assert found.tolist() == [0, 0]


def test_several_processes_whiten_as_one():
    """Each holds a tree; numbers of a pass over both stand in for the collective's."""
    groups = [random_group(seed, group_id=seed) for seed in (3, 4)]
    for whiten in ("token", "std"):
        options = AdvantageOptions(whiten=whiten)
        whole, totals = forest_of(*groups), []
        expected = tree_advantages(
            whole, rewards_of(*groups), options, global_sum=lambda x, t=totals: t.append(x) or x
        )
        of_tree = whole.tree_of_leaf[whole.pairs[0]]
        for k, made in enumerate(groups):
            calls = iter(totals)
            part = tree_advantages(
                forest_of(made), made.rewards, options, global_sum=lambda _, c=calls: next(c)
            )
            assert torch.allclose(part, expected[of_tree == k], atol=1e-9)
            assert next(calls, None) is None  # as many collectives, whatever the trees
        nothing = forest_of()
        calls = iter(totals)
        tree_advantages(nothing, torch.zeros(0), options, global_sum=lambda _, c=calls: next(c))
        assert next(calls, None) is None


def test_rewards_are_checked():
    made = figure_3(group_id=4)
    forest = forest_of(random_group(1), made)
    count = forest.num_leaves
    with pytest.raises(ValueError, match="each leaf needs one"):
        tree_advantages(forest, torch.zeros(count - 1), AdvantageOptions())
    rewards = torch.zeros(count)
    rewards[-2] = float("inf")
    with pytest.raises(ValueError, match="leaf 6 of the tree of group 4 has reward inf"):
        tree_advantages(forest, rewards, AdvantageOptions())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"whiten": "std", "estimator": "rloo"}, "algorithm.whiten=std"),
        ({"max_group_depth": 0}, "algorithm.max_group_depth"),
        ({"eta": 1.5}, "algorithm.eta"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        AdvantageOptions(**options)
