"""Packed rows of trees: the micro-oracle, log-probabilities of shared tokens, partitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from trace_toys import tiny
from tree_toys import block_group, chains, group, leaf, random_group, tree_group

from dlm_fast.algorithms.tree_rows import TreeLayout, flat_values, partition
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility
from dlm_fast.rollout.tree import Forest, PackedTree

EOS, MASK = 96, 98


def layout(kind="causal", budget=10_000):
    return TreeLayout(kind=kind, block_size=4, mask_id=MASK, row_budget=budget)


def packed(groups, kind="causal", budget=10_000):
    trees = [PackedTree.of(made) for made in groups]
    forest, plan = Forest.of(trees), layout(kind, budget)
    tokens = [plan.node_tokens(t, g, (EOS,)) for t, g in zip(trees, groups, strict=True)]
    return forest, plan.rows(forest, tokens)


def logprobs(policy, rows):
    request = ScoreRequest(policy.predicting_rows(rows.rows, rows.visibility), rows.targets)
    return policy(rows.input_ids, rows.visibility, score=request).logprob


def by_leaf(policy, groups, kind, budget=10_000):
    """Log-probabilities of each leaf's targets, from the packed passes."""
    forest, passes = packed(groups, kind, budget)
    value = torch.full((forest.node_of_token.numel(),), float("nan"), dtype=torch.float64)
    for rows in passes:
        assert value[rows.token].isnan().all(), "a token is a target twice"
        value[rows.token] = logprobs(policy, rows)
    of_trees = value.split([tree.num_tokens for tree in forest.trees])
    found = []
    for tree, own in zip(forest.trees, of_trees, strict=True):
        found += [flat[tree.prompt_length :] for flat in flat_values(tree, own)]
    return found


def micro_oracle():
    """Root [t0 t1] -> A [t2] -> {A1 [t3], A2 [t4 t5]}, root -> B [t6]."""
    parents, texts = [-1, -1, 0, 0], [[12], [16], [13], [14, 15]]
    return tree_group(parents, texts, [2, 3, 1], [1, 0, 0], prompt=(10, 11))


def test_micro_oracle():
    forest, (rows,) = packed([micro_oracle()])
    visibility = rows.visibility
    assert rows.input_ids.tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert visibility.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 2]
    assert visibility.intervals[:, 1].tolist() == [7, 7, 6, 4, 6, 6, 7]
    assert visibility.pred.tolist()[2:] == [1, 2, 2, 4, 1]
    assert int(visibility.dense().sum()) == 22
    (tree,) = forest.trees
    assert (tree.num_tokens, tree.num_flat_tokens) == (7, 12)
    assert sum(n * (n + 1) // 2 for n in tree.path_len.tolist()) == 31
    assert rows.rows.tolist() == rows.token.tolist() == [2, 3, 4, 5, 6]


def test_a_tree_of_one_chain_is_causal():
    alone = group([leaf((0, 1, 2), (2, 1, 3), [10, 11, 12, 13, 14, 15])])
    _, (rows,) = packed([alone])
    causal = Visibility.causal([9])
    for name in ("intervals", "position_ids", "pred", "lengths"):
        ours, theirs = getattr(rows.visibility, name), getattr(causal, name)
        assert ours == theirs if name == "lengths" else torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def policies():
    return {kind: tiny(kind) for kind in ("causal", "block")}


@pytest.mark.parametrize("kind", ["causal", "block"])
@pytest.mark.parametrize("seed", range(4))
def test_shared_tokens_are_scored_as_in_separate_sequences(policies, kind, seed):
    make = random_group if kind == "causal" else block_group
    groups = [make(seed, group_id=0), make(seed + 50, group_id=1)]
    with torch.no_grad():
        found = by_leaf(policies[kind], groups, kind)
        alone = [by_leaf(policies[kind], [one], kind)[0] for made in groups for one in chains(made)]
    members = [t for made in groups for t in made.trajectories]
    for ours, theirs, member in zip(found, alone, members, strict=True):
        assert len(ours) == member.response_length
        assert torch.allclose(ours, theirs, atol=1e-10, equal_nan=True)
        assert int((~ours.isnan()).sum()) == member.response_length


@pytest.mark.parametrize("kind", ["causal", "block"])
@pytest.mark.parametrize("budget", [1, 25, 60])
def test_parts_score_as_the_whole(policies, kind, budget):
    make = random_group if kind == "causal" else block_group
    groups = [make(3, leaves=14), make(8, leaves=14, group_id=1)]
    with torch.no_grad():
        whole = by_leaf(policies[kind], groups, kind)
        parts = by_leaf(policies[kind], groups, kind, budget)
    for ours, theirs in zip(parts, whole, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10, equal_nan=True)
    assert len(packed(groups, kind, budget)[1]) > len(packed(groups, kind)[1]) == 1


def test_a_fork_inside_a_block_stays_with_its_first_branch(policies):
    """Prompt 3, block 4: node 0 ends after two tokens of its block; each branch fills it up."""
    steps = {0: [1, 2, 3], 1: [4, 5, 6, 7, 8], 2: [5, 4, 6]}
    made = group(
        [
            leaf((0, k), (3, len(steps[k])), [10, 11, 12, *range(13, 13 + len(steps[k]))])
            for k in (1, 2)
        ]
    )
    for k, member in zip((1, 2), made.trajectories, strict=True):
        member.step_map = torch.tensor([*steps[0], *steps[k]], dtype=torch.int32)
    with torch.no_grad():
        found = by_leaf(policies["block"], [made], "block")
        cut = by_leaf(policies["block"], [made], "block", budget=1)
        first = by_leaf(policies["block"], chains(made)[:1], "block")[0]
    assert torch.allclose(found[0], first, atol=1e-10)
    for ours, theirs in zip(cut, found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(seed=integers(0, 10**6), budget=integers(1, 60))
def test_partitions_cover_every_node_once(seed, budget):
    tree = PackedTree.of(random_group(seed))
    sizes = tree.lengths.tolist()
    parts = partition(tree, sizes, sizes, budget)
    own = [n for part in parts for n, mine in zip(part.nodes, part.is_own, strict=True) if mine]
    assert own == list(range(1, tree.num_nodes))
    for part in parts:
        assert part.size == sum(sizes[n] for n in part.nodes)
        assert all(int(tree.parent[n]) in part.nodes for n in part.nodes[1:])
        assert list(part.nodes) == sorted(part.nodes)
        if part.size > budget:  # no more than one path
            assert sum(part.is_own) == 1


def test_parts_use_the_room_they_have():
    """Two branches of 6 tokens behind a prompt of 3 and a node of 3: budget 12 holds one each."""
    tree = PackedTree.of(tree_group([-1, 0, 0], [[10] * 3, [11] * 6, [12] * 6], [1, 2], [0, 1]))
    sizes = tree.lengths.tolist()
    parts = partition(tree, sizes, sizes, 12)
    assert [part.nodes for part in parts] == [(0, 1, 2), (0, 1, 3)]
    assert [part.is_own for part in parts] == [(False, True, True), (False, False, True)]
    assert len(partition(tree, sizes, sizes, 18)) == 1


def test_targets_end_with_the_first_end_of_text():
    made = group([leaf((0, 1), (1, 4), [10, 11, EOS, 12, 13]), leaf((0, 2), (1, 1), [10, 14])])
    _, (rows,) = packed([made])
    assert rows.targets.tolist() == [10, 11, EOS, 14]


def test_flat_values_gather_and_add_up():
    """A loss on whole responses, written per leaf, has the gradient of separate sequences."""
    tree = PackedTree.of(random_group(5))
    value = torch.randn(tree.num_tokens, dtype=torch.float64, requires_grad=True)
    flat = flat_values(tree, value)
    weights = torch.arange(1.0, 1 + tree.num_leaves).double()
    loss = sum(w * part.mean().exp() for w, part in zip(weights, flat, strict=True))
    (gradient,) = torch.autograd.grad(loss, value)
    expected = torch.zeros_like(value)
    starts = [0, *tree.path_len.cumsum(0).tolist()]
    for k, (w, part) in enumerate(zip(weights, flat, strict=True)):
        index = tree.leaf_path[starts[k] : starts[k + 1]]
        expected[index] += w * part.detach().mean().exp() / len(part)
    assert torch.allclose(gradient, expected)


def test_logits_of_every_unique_token(policies):
    """All rows of the pack, prompt included, against those of separate sequences."""
    made, policy = random_group(12), policies["causal"]
    forest, (rows,) = packed([made])
    (tree,) = forest.trees
    with torch.no_grad():
        packed_TV = policy.logits(rows.input_ids, rows.visibility, aligned=False)
        for flat_SV, member in zip(flat_values(tree, packed_TV), made.trajectories, strict=True):
            alone_SV = policy.logits(member.input_ids[None], aligned=False)[0]
            assert torch.allclose(flat_SV, alone_SV, atol=1e-10)
