"""Tests of what trees do to averages: published Monte Carlo numbers, found again."""

import math
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from dlm_fast.ops.philox import Rng, Stream, philox_uniform
from dlm_fast.rollout.growing_tree import GrowingTree, Growth
from dlm_fast.rollout.tree_config import TreeConfig

COUNT = 500


def grown(config: TreeConfig, mean_segments: float, count: int = COUNT) -> list[Any]:
    """Trees whose paths end after each segment, of one token, with one chance."""
    growth = Growth(
        config=config,
        max_new_tokens=config.max_depth,
        decode=lambda ids: "",
        finish=lambda node: None,
        split=lambda node, at: node.split(at),
        forget=lambda nodes: None,
        num_trees=1,
        seed=11,
    )
    prompt = torch.tensor([1])
    trees = []
    for name in range(count):
        tree = GrowingTree(prompt, sequence_id=name, leaves=config.leaves, growth=growth)
        while not tree.is_done:
            nodes = tree.open_nodes
            position = torch.tensor([node.stop for node in nodes], dtype=torch.int32)
            rng = Rng.of(12, Stream.TOKEN, [node.key for node in nodes]).at(position=position)
            for node, u in zip(nodes, philox_uniform(rng, 1)[:, 0].tolist(), strict=True):
                node.tokens.append(0)
                node.logprobs.append(0.0)
                node.is_stopped = u < 1 / mean_segments
            tree.advance(1)
        trees.append(tree.tree)
    return trees


def check(values: list[float], published: float, rounding: float = 0.005) -> None:
    error = stdev(values) / math.sqrt(len(values))
    assert abs(mean(values) - published) < 4 * error + rounding


def leaf_means(trees: list[Any]) -> list[float]:
    return [tree.flat_tokens / len(tree.leaves) for tree in trees]


def weighted_means(trees: list[Any]) -> list[float]:
    """Each leaf by the inverse of the copies on its path."""
    values = []
    for tree in trees:
        total = 0.0
        for leaf, made in zip(tree.leaves, tree.trajectories(seed=0, block_size=1), strict=True):
            total += tree.response_length(leaf) / math.prod(made.detail["tree"]["copies"])
        values.append(total)
    return values


@pytest.mark.parametrize(("first_branch", "leaf_mean", "saving"), [(2, 3.59, 1.79), (8, 2.5, 1.25)])
def test_long_paths_are_over_represented(
    first_branch: int, leaf_mean: float, saving: float
) -> None:
    config = TreeConfig(segment=1, first_branch=first_branch, answer="none", repetition="none")
    trees = grown(config, 2.0)
    check(leaf_means(trees), leaf_mean, rounding=0.05 if first_branch == 8 else 0.005)
    flat = sum(tree.flat_tokens for tree in trees)
    assert flat / sum(tree.unique_tokens for tree in trees) == pytest.approx(saving, abs=0.03)


def test_weights_by_copies_are_right_without_fallback() -> None:
    config = TreeConfig(segment=1, answer="none", repetition="none", fallback="none")
    trees = grown(config, 2.0)
    check(weighted_means(trees), 1.9999)
    assert mean(leaf_means(trees)) > 2.0
