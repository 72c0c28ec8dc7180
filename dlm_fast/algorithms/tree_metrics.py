"""What the trees of an iteration were like, for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dlm_fast.algorithms.contract import Largest, Metrics
from dlm_fast.rollout.trajectory import Group, trajectories_of
from dlm_fast.rollout.tree import PackedTree

REASONS = ("answer", "unclosed", "eos", "max_depth", "max_tokens", "repetition", "unfinished")
"""why the sampler of trees ends a path"""


def tree_metrics(trees: Sequence[PackedTree], groups: Sequence[Group], max_depth: int) -> Metrics:
    """(sum, count) each, over the trees of the groups; the sampler's own facts where it left any
    (``detail["tree"]``: reason, fallback, step, pages_peak). Shares are told where they are 0 too,
    or the processes' numbers would not add up. Leaves below ``max_depth`` count there."""
    count = float(len(trees))
    leaves = float(sum(tree.num_leaves for tree in trees))
    flat = float(sum(tree.num_flat_tokens for tree in trees))
    unique = float(sum(tree.num_tokens for tree in trees))
    metrics: Metrics = {
        "tree/flat_tokens": (flat, count),
        "tree/unique_tokens": (unique, count),
        "tree/sharing": (flat, unique),
        "tree/leaves": (leaves, count),
    }
    plain = weighted = correct = reward = 0.0
    depths: Counter[int] = Counter()
    for tree, group in zip(trees, groups, strict=True):
        members, weight = group.trajectories, tree.leaf_weight.tolist()
        lengths = [member.response_length for member in members]
        plain += sum(lengths) / len(lengths)
        weighted += sum(w * length for w, length in zip(weight, lengths, strict=True))
        correct += sum(w * member.correct for w, member in zip(weight, members, strict=True))
        reward += sum(w * member.reward for w, member in zip(weight, members, strict=True))
        depths.update(tree.depth[tree.leaf_node].clamp(max=max_depth).tolist())
    metrics |= {
        "tree/length_bias": (plain - weighted, count),
        "tree/length_weighted": (weighted, count),
        "tree/correct_weighted": (correct, count),
        "tree/reward_weighted": (reward, count),
    }
    metrics |= {
        f"tree/depth_{depth}": (float(depths[depth]), leaves) for depth in range(1, max_depth + 1)
    }
    return metrics | _sampler_facts(groups, count)


def _sampler_facts(groups: Sequence[Group], count: float) -> Metrics:
    facts = [t.detail["tree"] for t in trajectories_of(groups) if "tree" in t.detail]
    if not facts:
        return {}
    leaves = float(len(facts))
    from_fallback = float(sum(bool(fact.get("fallback")) for fact in facts))
    reasons = Counter(str(fact["reason"]) for fact in facts if "reason" in fact)
    steps = [float(fact["step"]) for fact in facts if "step" in fact]
    return {
        "tree/fallback_leaves": (from_fallback, leaves),
        "tree/leaves_before_fallback": (leaves - from_fallback, count),
        "tree/finish_step": (sum(steps), float(len(steps))),
        "tree/pages_peak": Largest(max(fact.get("pages_peak", 0) for fact in facts)),
        **{f"tree/reason_{name}": (float(reasons[name]), leaves) for name in REASONS},
    }
