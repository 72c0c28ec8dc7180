"""Gradient estimators of trees on a softmax table whose gradient is known by enumeration.

A tree's estimate is the mean over leaves of sum over tokens of A grad log pi. Bounds are three
standard errors of the simulation, with fixed seeds.
"""

from __future__ import annotations

import pytest
import torch
from tree_growth import STOP, SoftmaxTable, grow, uniform_numbers

from dlm_fast.algorithms.tree_advantages import AdvantageOptions, tree_advantages
from dlm_fast.rollout.tree import Forest

TABLE = SoftmaxTable(vocab=3, depth=4, seed=5)
SHAPES = {
    "star": {"width": 6, "first": 6, "branch": 1, "depth": 4},
    "tree": {"width": 8, "first": 2, "branch": 2, "depth": 4},
}


class Simulation:
    """Trees of one shape, and the score function of each of their pairs."""

    def __init__(self, shape, count, seed):
        draw = TABLE.sampler(seed)
        self.forest = forest = Forest.of([grow(draw, **shape) for _ in range(count)])
        token_N = torch.cat([tree.tokens for tree in forest.trees]).tolist()
        prefix_N, self.texts = [()], []
        for node in range(forest.num_nodes):
            parent = int(forest.parent[node])
            above = prefix_N[parent + 1] if parent >= 0 else ()
            prefix_N.append((*above, token_N[node]) if parent >= 0 else ())
        self.texts = [prefix_N[node + 1] for node in forest.leaf_node.tolist()]
        self.reward_W = torch.tensor([TABLE.reward[text] for text in self.texts]).double()
        leaf_Q, node_Q = forest.pairs
        self.row_Q = torch.tensor([TABLE.row[prefix_N[n + 1][:-1]] for n in node_Q.tolist()])
        self.token_Q = torch.tensor(token_N)[node_Q]
        self.tree_Q = forest.tree_of_leaf[leaf_Q]
        self.leaves_T = torch.bincount(forest.tree_of_leaf).double()

    def along(self, direction, **options):
        """(mean, standard error) of the estimates' component along ``direction``."""
        options = AdvantageOptions(**({"whiten": "none"} | options))
        advantage_Q = tree_advantages(self.forest, self.reward_W, options)
        centred = direction - (TABLE.probs * direction).sum(-1, keepdim=True)
        slope_Q = centred[self.row_Q, self.token_Q]  # of grad log pi = onehot - pi
        per_tree = torch.zeros(len(self.leaves_T), dtype=torch.float64)
        per_tree.index_add_(0, self.tree_Q, advantage_Q * slope_Q)
        return mean_and_error(per_tree / self.leaves_T)


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


@pytest.fixture(scope="module")
def simulated():
    return {name: Simulation(shape, 2500, seed=11) for name, shape in SHAPES.items()}


def directions():
    gradient = TABLE.gradient()
    other = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1)).double()
    return [gradient / gradient.norm(), other / other.norm()]


def test_a_star_with_leave_one_out_is_unbiased(simulated):
    for direction in directions():
        truth = float((TABLE.gradient() * direction).sum())
        mean, error = simulated["star"].along(direction, estimator="rloo")
        assert abs(mean - truth) < 3 * error
        shrunk, error = simulated["star"].along(direction, estimator="mean")
        assert shrunk == pytest.approx(mean * 5 / 6, rel=1e-9)
        assert abs(shrunk - truth * 5 / 6) < 3 * error


# Component of the mean estimate along the true gradient, and along another direction, at right
# angles to it, where the truth has none: with standard errors, in units of the gradient's length.
# 60,000 trees of SHAPES["tree"], seed 2.
MEASURED = {
    "mean": ((0.4815, 0.0025), (0.0765, 0.0006)),
    "size": ((0.5005, 0.0025), (0.0823, 0.0007)),
    "no_root": ((0.4018, 0.0023), (0.0815, 0.0006)),
    "rfpp": ((0.5588, 0.0027), (0.0797, 0.0008)),
    "rloo": ((0.6401, 0.0031), (0.0915, 0.0009)),
    "progress": ((0.6437, 0.0039), (0.0388, 0.0005)),
    "sibling_loo": ((1.3852, 0.0084), (0.0073, 0.0011)),
}


def shrink_and_bias(simulation, estimator):
    """Each with its standard error, in units of the gradient's length."""
    gradient, (along, other) = TABLE.gradient(), directions()
    other = other - (other * along).sum() * along
    other, length = other / other.norm(), float(gradient.norm())
    found = [simulation.along(d, estimator=estimator) for d in (along, other)]
    return [(mean / length, error / length) for mean, error in found]


@pytest.mark.parametrize("estimator", MEASURED)
def test_shrink_and_bias_of_trees(simulated, estimator):
    found = shrink_and_bias(simulated["tree"], estimator)
    for (mean, error), (known, its_error) in zip(found, MEASURED[estimator], strict=True):
        assert abs(mean - known) < 3 * (error**2 + its_error**2) ** 0.5


def test_leaf_weights_undo_the_multiplication_of_survivors(simulated):
    """Reward and length: the weighted mean has the policy's, the plain one does not."""
    simulation = simulated["tree"]
    weight_W = torch.cat([tree.leaf_weight for tree in simulation.forest.trees])
    tree_W, count_T = simulation.forest.tree_of_leaf, simulation.leaves_T
    length_W = torch.tensor([len(text) for text in simulation.texts]).double()
    for value_W, truth in (
        (length_W, TABLE.expected(len)),
        (simulation.reward_W, TABLE.expected(lambda text: TABLE.reward[text])),
    ):
        zeros = torch.zeros_like(count_T)
        weighted, error = mean_and_error(zeros.index_add(0, tree_W, weight_W * value_W))
        assert abs(weighted - truth) < 3 * error
        plain, error = mean_and_error(zeros.index_add(0, tree_W, value_W) / count_T)
        assert abs(plain - truth) > 3 * error


@pytest.mark.parametrize(
    ("segments", "weighted", "plain"), [(2.0, 1.9999, 3.82), (4.0, 3.9287, 5.86)]
)
def test_length_bias_of_the_paper_s_setting(segments, weighted, plain):
    """w = 16, b = b0 = 2, D = 14, geometric path lengths, no fallback: long paths are over-
    represented among leaves; leaf weights take that back."""
    numbers = uniform_numbers(3)

    def draw(prefix):
        return STOP if next(numbers) < 1 / segments else 1

    trees = [grow(draw, width=16, first=2, branch=2, depth=14) for _ in range(1500)]
    means = torch.tensor([float((t.leaf_weight * (t.path_len - 1)).sum()) for t in trees])
    mean, error = mean_and_error(means)
    assert abs(mean - weighted) < 3 * error
    total = torch.tensor([float((t.path_len - 1).sum()) for t in trees])
    count = torch.tensor([float(t.num_leaves) for t in trees])
    pooled = float(total.sum() / count.sum())
    spread = float((total - pooled * count).std()) / float(count.mean()) / len(trees) ** 0.5
    assert abs(pooled - plain) < 3 * spread + 0.005
