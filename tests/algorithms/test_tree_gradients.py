"""Gradients of packed trees equal the sum over separate sequences, term by term of the loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from trace_toys import context, tiny
from tree_toys import block_group, chains, group, leaf, random_group, tree_group

from dlm_fast.algorithms import treepo
from dlm_fast.algorithms.tree_advantages import tree_advantages
from dlm_fast.algorithms.tree_tokens import NodeWeights, TreeTokens
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.tree import Forest, PackedTree
from dlm_fast.rollout.tree_config import TreeConfig


@pytest.fixture(scope="module")
def policies():
    return {kind: tiny(kind) for kind in ("causal", "block")}


def build(policy, num_prompts=2, **options):
    config = treepo.Config(**({"reject": "none", "tree": TreeConfig(leaves=4)} | options))
    algorithm = config.build(
        rollout=SamplerConfig(max_new_tokens=64, block_size=4, steps=64),
        num_prompts=num_prompts,
        mask_id=policy.family.mask_id,
        seed=0,
    )
    return algorithm, context(algorithm, policy)[0]


def logprob_and_entropy(policy, rows):
    request = ScoreRequest(
        policy.predicting_rows(rows.rows, rows.visibility),
        rows.targets,
        forbid_ids=(policy.family.mask_id, *policy.family.unused_ids),
    )
    output = policy(rows.input_ids, rows.visibility, score=request)
    return output.logprob, output.entropy


def token_loss(log_ratio, advantage):
    """Dual-clip PPO with clip-higher, as printed: 0.2, 0.28, 10."""
    ratio = log_ratio.exp()
    if advantage >= 0:
        return -advantage * torch.minimum(ratio, torch.tensor(1.28, dtype=torch.float64))
    return -advantage * ratio.clamp(min=0.8).clamp(max=10.0)


def separate_loss(algorithm, made, policy, groups, old):
    """Each leaf as a sequence of its own, token by token. ``old``: of the forest's tokens."""
    config = algorithm.config
    forest = Forest.of([PackedTree.of(g) for g in groups])
    rewards = torch.cat([g.rewards for g in groups])
    advantage_Q = tree_advantages(forest, rewards, config)
    of_pair = {
        pair: a
        for *pair, a in zip(*(x.tolist() for x in (*forest.pairs, advantage_Q)), strict=True)
        for pair in [tuple(pair)]
    }
    plain, _ = build(policy, num_prompts=1)
    total, leaf = torch.zeros((), dtype=torch.float64), 0
    lengths = [t.response_length for g in groups for t in g.trajectories]
    for k, (members, tree) in enumerate(zip(groups, forest.trees, strict=True)):
        starts = [0, *tree.path_len.cumsum(0).tolist()]
        for member, alone in enumerate(chains(members)):
            alone.trajectories[0].group_id = 0
            (micro,) = plain.prepare([alone], made)[0]
            order = micro.rows.token - tree.prompt_length
            logprob, entropy = logprob_and_entropy(policy, micro.rows)
            path = tree.leaf_path[starts[member] : starts[member + 1]] + forest.first_token[k]
            tokens = path[tree.prompt_length :][order]
            weight = 1 / sum(lengths)
            if config.loss_agg == "seq_mean_len":
                weight = 1 / (len(lengths) * lengths[leaf])
            for u, token in enumerate(tokens.tolist()):
                a = of_pair[leaf, int(forest.node_of_token[token])]
                d = logprob[u] - old[token]
                term = token_loss(d, a) - config.entropy_weight * entropy[u]
                total = total + weight * (term + config.kl_weight * ((-d).exp() - 1 + d))
            leaf += 1
    return total


def gradients(loss, policy):
    parameters = [p for p in policy.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


CASES = [
    {"estimator": "mean"},
    {"estimator": "mean", "loss_agg": "seq_mean_len"},
    {"estimator": "size", "kl_weight": 0.3},
    {"estimator": "progress", "eta": 0.9},
    {"estimator": "sibling_loo", "whiten": "none", "entropy_weight": 0.1},
]


@pytest.mark.parametrize("kind", ["causal", "block"])
@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("budget", [40, 8192])
def test_packed_equals_separate(policies, kind, options, budget):
    """Ratios far from 1, so that every clip is at work; also with trees cut into parts."""
    policy = policies[kind]
    make = random_group if kind == "causal" else block_group
    groups = [make(21, leaves=5), make(34, leaves=5, group_id=1)]
    algorithm, made = build(policy, rows_per_forward=budget, **options)
    (step,) = algorithm.prepare(groups, made)
    assert (len(step) > 1) == (budget == 40)
    total = sum(PackedTree.of(g).num_tokens for g in groups)
    noise = 1.5 * torch.randn(total, generator=torch.Generator().manual_seed(4)).double()
    old = torch.full((total,), float("nan"), dtype=torch.float64)
    with torch.no_grad():
        for micro in step:
            token = micro.rows.token
            micro.old = logprob_and_entropy(policy, micro.rows)[0] + noise[token]
            old[token] = micro.old
    assert bool((noise.abs() > 2.4).any())
    loss = sum(algorithm.loss(micro, policy)[0] for micro in step)
    truth = separate_loss(algorithm, made, policy, groups, old)
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), abs=1e-10)
    for ours, theirs in zip(gradients(loss, policy), gradients(truth, policy), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["causal", "block"])
@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_the_first_step_needs_no_old_pass(policies, kind, kl):
    """Weights that are known beforehand give the gradient of the clipped loss at ratio 1."""
    policy = policies[kind]
    make = random_group if kind == "causal" else block_group
    groups = [make(2, leaves=5), make(5, leaves=5, group_id=1)]
    algorithm, made = build(policy, kl=kl, kl_weight=0.2)
    (step,) = algorithm.prepare(groups, made)
    assert all(micro.old is None for micro in step)
    fast, _ = algorithm.loss(step[0], policy)
    step[0].old = logprob_and_entropy(policy, step[0].rows)[0].detach()
    slow, _ = algorithm.loss(step[0], policy)
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), abs=1e-12)
    for ours, theirs in zip(gradients(fast, policy), gradients(slow, policy), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_two_weights_where_one_is_wrong():
    """A = {1, -0.5} on a shared token at r = 1.3: -0.63 with slope 0.5, not -0.64 with slope 0."""
    weights = NodeWeights(
        plus_N=torch.tensor([1.0]),
        minus_N=torch.tensor([0.5]),
        share_N=torch.tensor([2.0]),
        divisor=1.0,
    )
    policy = tiny("causal")
    algorithm, made = build(policy)
    members = tree_group([-1, 0, 0], [[10], [11], [12]], [1, 2], [1, 0])
    (step,) = algorithm.prepare([members, members], made)
    rows = step[0].rows
    first = TreeTokens(
        rows=rows,
        plus=torch.zeros(len(rows.targets), dtype=torch.float64),
        minus=torch.zeros(len(rows.targets), dtype=torch.float64),
        share=torch.zeros(len(rows.targets), dtype=torch.float64),
        divisor=weights.divisor,
        rollout=torch.zeros(len(rows.targets), dtype=torch.float64),
    )
    first.plus[0], first.minus[0], first.share[0] = 1.0, 0.5, 2.0
    logprob = torch.zeros(len(rows.targets), dtype=torch.float64, requires_grad=True)
    first.old = logprob.detach() - torch.tensor(1.3, dtype=torch.float64).log()

    def forward(*inputs, score):
        return type("Output", (), {"logprob": logprob})

    loss, _ = algorithm.loss(first, forward)
    assert float(loss.detach()) == pytest.approx(-0.63)
    (slope,) = torch.autograd.grad(loss, logprob)
    assert float(slope[0]) / 1.3 == pytest.approx(0.5)  # d ratio / d logprob = ratio
    one_weight = -0.5 * min(1.3, 1.28)
    assert one_weight == pytest.approx(-0.64)


def test_two_weights_are_exact_for_any_leaves():
    """10,000 tokens with random advantages of their leaves and random ratios."""
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(10_000, 6, generator=generator, dtype=torch.float64)
    share = torch.rand(10_000, 6, generator=generator, dtype=torch.float64)
    log_ratio = 1.5 * torch.randn(10_000, generator=generator, dtype=torch.float64)
    from dlm_fast.algorithms.clipped_loss import clipped_objective

    clips = (0.2, 0.28, 10.0)
    each = clipped_objective(log_ratio[:, None].expand(-1, 6), advantage, *clips)
    plus = (share * advantage.clamp(min=0)).sum(1)
    minus = (share * (-advantage).clamp(min=0)).sum(1)
    merged = clipped_objective(log_ratio, plus, *clips)
    merged = merged + clipped_objective(log_ratio, -minus, *clips)
    assert torch.allclose(merged, (share * each).sum(1), atol=1e-12)


@pytest.mark.parametrize("kind", ["causal", "block"])
def test_bf16_gradients_point_the_same_way(policies, kind):
    """Matrix products in bf16: the packed gradient against that of separate sequences."""
    policy = tiny(kind, width=32).float()
    make = random_group if kind == "causal" else block_group
    groups = [make(13, leaves=6)]
    algorithm, made = build(policy, num_prompts=1, rows_per_forward=8192)
    (step,) = algorithm.prepare(groups, made)
    of_node = {}
    tree = PackedTree.of(groups[0])
    forest = Forest.of([tree])
    for micro in step:
        of_node |= dict(
            zip(micro.rows.token.tolist(), (micro.plus - micro.minus).tolist(), strict=True)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed = sum(algorithm.loss(micro, policy)[0] for micro in step)
    ours = torch.cat([g.flatten() for g in gradients(packed, policy)])
    total = torch.zeros_like(ours)
    starts = [0, *tree.path_len.cumsum(0).tolist()]
    n_leaf = tree.n_leaf[forest.node_of_token].double()
    for member, alone in enumerate(chains(groups[0])):
        alone.trajectories[0].group_id = 0
        (micro,) = algorithm.prepare([alone], made)[0]
        path = tree.leaf_path[starts[member] : starts[member + 1]]
        token = path[micro.rows.token]
        # a shared token's weight, spread evenly over its leaves
        weight = torch.tensor([of_node[t] for t in token.tolist()]).double() / n_leaf[token]
        micro.plus, micro.minus, micro.old = weight, torch.zeros_like(weight), None
        micro.divisor = step[0].divisor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = algorithm.loss(micro, policy)
        total += torch.cat([g.flatten() for g in gradients(loss, policy)])
    assert float(torch.cosine_similarity(ours, total, dim=0)) > 0.9999


def test_micro_batches_add_up(policies):
    """Any row budget gives one gradient, and the divisor is the step's."""
    groups = [random_group(s, group_id=g) for g, s in enumerate((1, 4))]
    found = []
    for budget, agg in itertools.product((5, 30, 8192), ("token_mean", "seq_mean_len")):
        algorithm, made = build(policies["causal"], rows_per_forward=budget, loss_agg=agg)
        (step,) = algorithm.prepare(groups, made)
        loss = sum(algorithm.loss(micro, policies["causal"])[0] for micro in step)
        found.append((agg, gradients(loss, policies["causal"])[0]))
    for agg in ("token_mean", "seq_mean_len"):
        first, *others = [g for name, g in found if name == agg]
        assert all(torch.allclose(first, other, atol=1e-12) for other in others)


def test_equal_rewards_move_nothing(policies):
    members = group([leaf((), (), [10, 11, 12 + k], reward=1) for k in range(3)])
    algorithm, made = build(policies["causal"], num_prompts=1)
    ((micro,),) = algorithm.prepare([members], made)
    loss, _ = algorithm.loss(micro, policies["causal"])
    assert all(torch.count_nonzero(g) == 0 for g in gradients(loss, policies["causal"]))
