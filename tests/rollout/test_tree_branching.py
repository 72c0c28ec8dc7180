"""Tests of budgets, sharing, fallback orders and cuts, against numbers worked out by hand."""

import math
from collections import Counter
from typing import Any

import pytest

from dlm_fast.ops.philox import Rng, Stream, philox_uniform
from dlm_fast.rollout.tree_branching import (
    draw_between,
    first_copies,
    logprob_weights,
    share_by_weight,
    share_evenly,
    step_limit,
    temperature_at,
    total_copies,
    width_for_tokens,
)
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_fallback import Candidate, order_of, tokens_to_keep
from dlm_fast.rollout.tree_rules import Reason


def uniforms(count: int, name: int = 0) -> list[float]:
    return philox_uniform(Rng.of(7, Stream.TREE, [name]), count)[0].tolist()


@pytest.mark.parametrize(
    ("limit", "branch", "active", "just_finished", "total"),
    [
        (16, 2, 2, 0, 4),  # b^depth until the leaves are reached
        (16, 2, 4, 4, 16),  # what finished passes its share on
        (14, 2, 8, 0, 14),
        (12, 2, 4, 4, 12),
        (3, 2, 3, 5, 3),
        (16, 4, 1, 3, 16),
        (16, 1, 3, 1, 4),
        (2, 1, 2, 0, 2),
    ],
)
def test_copies_of_a_step(
    limit: int, branch: int, active: int, just_finished: int, total: int
) -> None:
    facts = {"limit": limit, "branch": branch, "active": active, "just_finished": just_finished}
    assert total_copies(**facts) == total


def test_copies_of_the_prompt() -> None:
    facts = {"leaves": 16, "num_trees": 8}
    assert first_copies(TreeConfig(), **facts, uniform=0.9) == 2
    many = TreeConfig(first_branch_max=8)
    drawn = Counter(first_copies(many, **facts, uniform=u) for u in uniforms(7000))
    assert sorted(drawn) == list(range(2, 9)) and min(drawn.values()) > 880
    budget = TreeConfig(budget="step_tokens", token_budget=512 * 8 * 5, sync="global")
    assert first_copies(budget, **facts, uniform=0.5) == 5
    assert first_copies(budget, leaves=3, num_trees=8, uniform=0.5) == 3
    assert first_copies(budget, leaves=16, num_trees=100, uniform=0.5) == 1


def test_the_ends_of_a_draw_are_inside() -> None:
    assert draw_between(3, None, 0.7) == 3
    assert draw_between(3, 5, 1e-9) == 3
    assert draw_between(3, 5, 1 - 1e-9) == 5


def test_limits_of_a_step() -> None:
    assert step_limit(TreeConfig(), leaves=16, finished=5, num_live_trees=9) == 11
    budget = TreeConfig(budget="step_tokens", token_budget=512 * 12, sync="global")
    assert step_limit(budget, leaves=16, finished=5, num_live_trees=3) == 4
    assert step_limit(budget, leaves=16, finished=15, num_live_trees=3) == 1


def test_width_of_a_token_budget() -> None:
    config = TreeConfig(budget="response_tokens", token_budget=10000, segment=500, max_width=12)
    facts = {"finished": 3, "finished_tokens": 4000}
    assert width_for_tokens(config, **facts, mean_length=500.0) == 3 + 6
    assert width_for_tokens(config, **facts, mean_length=1.0) == 12
    assert width_for_tokens(config, finished=0, finished_tokens=20000, mean_length=1.0) == 1


def test_even_shares() -> None:
    assert share_evenly(8, 3) == [3, 3, 2]
    assert share_evenly(8, 3, last_takes_rest=True) == [2, 2, 4]
    assert share_evenly(3, 3) == [1, 1, 1]


def test_largest_remainders() -> None:
    assert share_by_weight(8, (0.5, 0.3, 0.2)) == [4, 2, 2]
    assert share_by_weight(3, (0.5, 0.3, 0.2)) == [1, 1, 1]
    assert share_by_weight(4, (0.25, 0.25, 0.25, 0.25)) == [1, 1, 1, 1]
    assert share_by_weight(6, (0.25, 0.25, 0.25, 0.25)) == [2, 2, 1, 1]  # ties to the first
    assert share_by_weight(9, (0.1, 0.9)) == [2, 7]


def test_weights_of_log_probabilities() -> None:
    low = logprob_weights([-1.0, -3.0], prefer="low", temperature=2.0)
    assert low == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    high = logprob_weights([-1.0, -3.0], prefer="high", temperature=2.0)
    assert high == pytest.approx(low[::-1])
    assert logprob_weights([-1e4, -1.0], prefer="high", temperature=0.1) == [0.0, 1.0]


def test_temperatures_follow_half_a_sine() -> None:
    assert temperature_at(TreeConfig(), 0.3) == 2.0
    falling = TreeConfig(share_temperature=5.0, share_temperature_end=1.0)
    assert [temperature_at(falling, s) for s in (0.0, 0.5, 1.0)] == pytest.approx([5.0, 3.0, 1.0])
    rising = TreeConfig(share_temperature=1.0, share_temperature_end=5.0)
    expected = 3 + 2 * math.sin(math.pi * 0.25 - math.pi / 2)
    assert temperature_at(rising, 0.25) == pytest.approx(expected)


FINISHED = [
    Candidate(reason=reason, length=length)
    for reason, length in (
        (Reason.MAX_DEPTH, 2048),
        (Reason.EOS, 100),
        (Reason.ANSWER, 1500),
        (Reason.REPETITION, 700),
        (Reason.ANSWER, 300),
    )
]


def test_orders_of_the_fallback() -> None:
    draws = uniforms(5)
    assert order_of(FINISHED, TreeConfig(fallback="strict"), draws) == [2, 4, 1, 0, 3]
    assert sorted(order_of(FINISHED, TreeConfig(), draws)) == [1, 2, 4]
    assert order_of(FINISHED, TreeConfig(fallback="answer_min_blocks"), draws) == [2]
    assert order_of(FINISHED, TreeConfig(fallback="none"), draws) == []
    assert sorted(order_of(FINISHED, TreeConfig(fallback="random"), draws)) == [0, 1, 2, 3, 4]
    assert order_of([], TreeConfig(), []) == []


@pytest.mark.parametrize(
    ("fallback", "weights"),
    [
        ("weighted", [4, 5, 7, 2, 7]),
        ("longest", [2048, 100, 1500, 700, 300]),
        ("random", [1, 1, 1, 1, 1]),
        ("answer_or_eos", [0, 1, 1, 0, 1]),
    ],
)
def test_the_first_candidate_is_drawn_by_its_weight(fallback: Any, weights: list[int]) -> None:
    count, config = 4000, TreeConfig(fallback=fallback)
    first = Counter(order_of(FINISHED, config, uniforms(5, name))[0] for name in range(count))
    expected = [count * weight / sum(weights) for weight in weights]
    square = sum((first[i] - e) ** 2 / e for i, e in enumerate(expected) if e)
    assert square < 18.5 and all(first[i] == 0 for i, e in enumerate(expected) if not e)


@pytest.mark.parametrize(("max_back", "kept"), [(None, [0, 8, 16, 24, 32]), (2, [24, 32])])
def test_cuts_are_even_over_the_segments(max_back: int | None, kept: list[int]) -> None:
    config = TreeConfig(segment=8, max_back=max_back)
    cuts = Counter(tokens_to_keep(37, config, u, ()) for u in uniforms(5000))
    assert sorted(cuts) == kept
    expected = 5000 / len(kept)
    square = sum((n - expected) ** 2 / expected for n in cuts.values())
    assert square < 18.5  # 4 degrees of freedom: one in a thousand


def test_a_path_shorter_than_a_window_starts_anew() -> None:
    assert tokens_to_keep(5, TreeConfig(segment=8), 0.1, ()) == 0


def test_a_cut_leaves_room_for_a_segment() -> None:
    config = TreeConfig(segment=8, max_depth=3, cut_window=1, allow_split=True)
    assert tokens_to_keep(40, config, 1e-9, ()) == 16
    assert tokens_to_keep(24, config, 1e-9, ()) == 23


def test_windows_of_other_sizes() -> None:
    wide = TreeConfig(segment=8, cut_window=16)
    assert {tokens_to_keep(40, wide, u, ()) for u in uniforms(99)} == {0, 16, 32}
    narrow = TreeConfig(segment=8, cut_window=4)
    # without splits a cut goes on to the edge of its segment
    assert {tokens_to_keep(17, narrow, u, ()) for u in uniforms(99)} == {0, 8, 16}
    split = TreeConfig(segment=8, cut_window=4, allow_split=True)
    assert {tokens_to_keep(17, split, u, ()) for u in uniforms(99)} == {0, 4, 8, 12, 16}


def test_cuts_at_tokens_and_blocks() -> None:
    logprobs = [-0.1] * 128 + [-2.0] * 128 + [-0.5] * 10
    options = {"segment": 512, "allow_split": True}
    lowest = TreeConfig(cut="min_logprob_token", **options)
    assert tokens_to_keep(266, lowest, 0.5, logprobs) == 128
    assert tokens_to_keep(266, TreeConfig(cut="from_start"), 0.5, logprobs) == 0
    for cut, sign in (("block", -1), ("inverse_block", 1)):
        weights = [math.exp(sign * mean) for mean in (-0.1, -2.0, -0.5)]
        config = TreeConfig(cut=cut, **options)
        drawn = Counter(tokens_to_keep(266, config, u, logprobs) for u in uniforms(3000))
        expected = [3000 * weight / sum(weights) for weight in weights]
        square = sum((drawn[128 * i] - e) ** 2 / e for i, e in enumerate(expected))
        assert square < 13.8 and sum(drawn.values()) == 3000
