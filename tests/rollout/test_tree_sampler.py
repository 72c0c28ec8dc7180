"""Tests of tree growth with scripted models: budgets, ends, fallback, scheduling, bad input."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tree_scripts import (
    EOS,
    ScriptedPolicy,
    check_tree,
    ends_with_chance,
    grow,
    sampler,
    shape,
    writes,
)

from dlm_fast.rollout import sample
from dlm_fast.rollout.growing_tree import GrowingTree
from dlm_fast.rollout.trajectory import Group
from dlm_fast.rollout.tree import PackedTree
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_sampler import rollout_trees

SMALL: dict[str, Any] = {"leaves": 8, "segment": 4, "max_depth": 5}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"first_branch": 8},
    {"first_branch_max": 6},
    {"branch": 3},
    {"branch": 1, "first_branch": 1},
    {"budget": "random", "branch": 1, "branch_max": 4},
    {"budget": "step_tokens", "token_budget": 40, "sync": "global"},
    {"share": "logprob", "share_score": "sum"},
    {"share": "logprob", "share_prefer": "high", "share_score": "segment"},
    {"fallback": "weighted"},
    {"fallback": "longest", "max_back": 1},
    {"fallback": "random"},
    {"fallback": "strict", "cut": "from_start"},
    {"fallback": "answer_min_blocks"},
    {"cut": "min_logprob_token", "allow_split": True},
    {"cut": "block", "allow_split": True},
    {"cut_window": 3, "allow_split": True},
    {"cut_window": 2},
    {"repetition": "token"},
    {"compat": True},
]


@pytest.fixture
def within_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step finished and active paths fit the leaves."""
    advance = GrowingTree.advance

    def checked(self: GrowingTree, num_live_trees: int) -> None:
        advance(self, num_live_trees)
        assert len(self._paths) + len(self.tree.leaves) <= self.leaves

    monkeypatch.setattr(GrowingTree, "advance", checked)


@pytest.mark.parametrize("sync", ["tree", "global", "path"])
@pytest.mark.parametrize("changes", OPTIONS, ids=lambda c: "-".join(map(str, c.values())) or "none")
def test_a_tree_ends_with_its_leaves(
    changes: dict[str, Any], sync: str, within_budget: None
) -> None:
    if sync == "path" and changes.get("share") == "logprob":
        pytest.skip("refused")
    config = TreeConfig(**{**SMALL, "sync": sync, **changes})
    for chance in (0.02, 0.3, 0.9):
        policy = ScriptedPolicy(ends_with_chance(chance))
        for tree in grow(policy, config, ("P", "Q", "RS"), seed=1):
            assert len(tree.leaves) == 8
            check_tree(tree, config)


@pytest.mark.parametrize("sync", ["tree", "global", "path"])
def test_a_tree_is_the_same_in_any_company(sync: str) -> None:
    config = TreeConfig(**SMALL, sync=sync, first_branch_max=4)
    policy = ScriptedPolicy(ends_with_chance(0.1))
    prompts = ["P", "Q", "P", "RST"]
    together = [shape(tree) for tree in grow(policy, config, prompts, seed=5)]
    batches = [shape(tree) for tree in grow(policy, config, prompts, seed=5, max_batch=3)]
    order = [2, 0, 3, 1]
    mixed = grow(policy, config, [prompts[i] for i in order], seed=5, sequence_ids=order)
    alone = [
        shape(grow(policy, config, [prompt], seed=5, sequence_ids=[i])[0])
        for i, prompt in enumerate(prompts)
    ]
    assert together == batches == alone == [shape(mixed[order.index(i)]) for i in range(4)]
    assert together[0] != together[2]  # equal prompts, other names
    assert max(policy.drawn_per_forward) > 3


def test_no_forward_is_larger_than_asked() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.1))
    grow(policy, TreeConfig(**SMALL), ["P", "Q", "R"], max_batch=3)
    assert max(policy.drawn_per_forward) == 3


@pytest.mark.parametrize("chance", [0.0, 0.2])
def test_one_path_is_a_flat_rollout(chance: float) -> None:
    policy = ScriptedPolicy(ends_with_chance(chance))
    config = TreeConfig(leaves=1, branch=1, segment=4, max_depth=5)
    prompts = ["P", "Q", "R", "S"]
    flat = sample(policy, prompts, sampler(20), seed=3)  # type: ignore[arg-type]
    for one, tree in zip(flat, grow(policy, config, prompts, seed=3), strict=True):
        [path] = tree.trajectories(seed=3, block_size=1)
        for name in ("response_ids", "logp_rollout", "step_map", "prompt_ids"):
            assert torch.equal(getattr(one, name), getattr(path, name))
        assert (one.finish_reason, one.num_forwards) == (path.finish_reason, path.num_forwards)
        assert path.node_lengths[:-1] == (4,) * (len(path.node_lengths) - 1)


def test_two_copies_until_the_leaves_are_there() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.0))
    [tree] = grow(policy, TreeConfig(**SMALL))
    widths = [len(list(run)) for _, run in itertools.groupby(policy.drawn_per_forward)]
    drawn = [n for n, _ in itertools.groupby(policy.drawn_per_forward)]
    assert (drawn, widths) == ([2, 4, 8], [4, 4, 12])
    assert tree.unique_tokens == 2 * 4 + 4 * 4 + 8 * 12 and tree.flat_tokens == 8 * 20
    made = tree.trajectories(seed=0, block_size=1)
    assert {t.detail["tree"]["reason"] for t in made} == {"max_tokens"}
    assert {tuple(t.detail["tree"]["copies"]) for t in made} == {(2, 2, 2, 1, 1)}


def test_finished_paths_pass_their_share_on() -> None:
    # of the two first paths one ends at once; the other gets all four copies of the next step
    def script(path: Sequence[int], uniform: float) -> int:
        if len(path) == 1:
            script.count += 1  # type: ignore[attr-defined]
            return EOS if script.count == 1 else ord("b")  # type: ignore[attr-defined]
        return ord("c")

    script.count = 0  # type: ignore[attr-defined]
    policy = ScriptedPolicy(script)
    [tree] = grow(policy, TreeConfig(**SMALL))
    made = tree.trajectories(seed=0, block_size=1)
    assert [t.detail["tree"]["copies"] for t in made[1:2]] == [[2, 4, 2, 1, 1]]
    assert made[0].response_ids.tolist() == [EOS] and made[0].detail["tree"]["reason"] == "eos"
    assert len(made) == 8


def test_an_end_of_text_token_at_the_start_of_a_segment_is_seen() -> None:
    policy = ScriptedPolicy(writes("abcd\0"))
    config = TreeConfig(leaves=4, branch=2, segment=4, max_depth=5, fallback="none")
    [tree] = grow(policy, config)
    assert [t.node_lengths for t in tree.trajectories(seed=0, block_size=1)] == [(4, 1)] * 4
    assert {leaf.reason.name for leaf in tree.leaves} == {"EOS"}


def test_every_end_of_text_token_counts() -> None:
    policy = ScriptedPolicy(writes("ab\x07cdefgh"), eos_ids=(EOS, 7))
    [tree] = grow(policy, TreeConfig(leaves=1, segment=4, max_depth=2))
    [made] = tree.trajectories(seed=0, block_size=1)
    assert (made.response_ids.tolist(), made.finish_reason) == ([97, 98, 7], "eos")


def test_a_box_across_an_edge_is_an_answer() -> None:
    policy = ScriptedPolicy(writes("it is \\boxed{42}.\0"))
    [tree] = grow(policy, TreeConfig(leaves=2, segment=4, max_depth=9))
    assert [leaf.reason.name for leaf in tree.leaves] == ["ANSWER", "ANSWER"]
    [tree] = grow(policy, TreeConfig(leaves=2, segment=4, max_depth=9, answer="boxed_as_eos"))
    made = tree.trajectories(seed=0, block_size=1)
    assert [(t.response_length, t.finish_reason) for t in made] == [(16, "stop")] * 2


def test_a_loop_ends_a_path() -> None:
    policy = ScriptedPolicy(lambda path, uniform: ord("x"))
    [tree] = grow(policy, TreeConfig(leaves=2, segment=39, max_depth=9))
    assert [leaf.reason.name for leaf in tree.leaves] == ["REPETITION"] * 2
    assert tree.trajectories(seed=0, block_size=1)[0].finish_reason == "stop"
    [tree] = grow(policy, TreeConfig(leaves=2, segment=38, max_depth=3))
    assert [leaf.reason.name for leaf in tree.leaves] == ["MAX_TOKENS"] * 2


def test_depth_and_length_limits() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.0))
    [tree] = grow(policy, TreeConfig(**SMALL), max_new_tokens=100)
    assert {leaf.reason.name for leaf in tree.leaves} == {"MAX_TOKENS"}
    [tree] = grow(policy, TreeConfig(**SMALL), max_new_tokens=10)
    assert {t.response_length for t in tree.trajectories(seed=0, block_size=1)} == {10}
    check_tree(tree, TreeConfig(**SMALL))


def test_forks_by_all_copies_weigh_one() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.05))
    for first in (1, 2, 5):
        config = TreeConfig(**SMALL, first_branch=first)
        for tree in grow(policy, config, ["P"] * 6):
            if tree.fallbacks:
                continue
            weights = []
            for trajectory in tree.trajectories(seed=0, block_size=1):
                weight = 1.0
                for copies in trajectory.detail["tree"]["copies"]:
                    weight /= copies
                weights.append(weight)
            assert sum(weights) == pytest.approx(1.0)


def test_fallback_goes_on_from_finished_paths() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.3))
    config = TreeConfig(**SMALL)
    trees = grow(policy, config, ["P"] * 10)
    assert sum(tree.fallbacks for tree in trees) > 0
    for tree in trees:
        flags = [t.detail["tree"]["fallback"] for t in tree.trajectories(seed=0, block_size=1)]
        assert any(flags) == bool(tree.fallbacks) and not flags[0]


def test_paths_that_all_end_with_their_first_token_stay_apart() -> None:
    policy = ScriptedPolicy(writes("\0"))
    [tree] = grow(policy, TreeConfig(**SMALL))
    made = tree.trajectories(seed=0, block_size=1)
    assert [t.response_ids.tolist() for t in made] == [[EOS]] * 8
    assert len({t.node_path for t in made}) == 8 == len(tree.root.children) == tree.unique_tokens
    assert [t.detail["tree"]["step"] for t in made[:2]] == [1, 1]
    packed = PackedTree.of(Group(task_id=0, prompt_ids=tree.prompt_ids, trajectories=made))
    assert (packed.num_leaves, packed.num_tokens, packed.num_flat_tokens) == (8, 9, 16)


def test_without_fallback_a_tree_stays_small() -> None:
    policy = ScriptedPolicy(writes("\0"))
    [tree] = grow(policy, TreeConfig(**SMALL, fallback="none"))
    assert len(tree.leaves) == 2 and tree.fallbacks == 0


def test_paths_that_nobody_may_cut_leave_a_restart() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.0))  # all end by length: no answer, no end of text
    config = TreeConfig(**SMALL, branch=1, first_branch=2)
    [tree] = grow(policy, config)
    assert [len(n.children) for n in [tree.root]] == [8] and tree.fallbacks == 6


def test_short_paths_are_replaced() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.2))
    config = TreeConfig(**SMALL, min_finished_tokens=3)
    trees = grow(policy, config, ["P", "Q", "R"])
    assert sum(tree.dropped for tree in trees) > 3
    for tree in trees:
        made = tree.trajectories(seed=0, block_size=1)
        assert len(made) == 8 and min(t.response_length for t in made) >= 3
        check_tree(tree, config)


def test_short_paths_are_kept_when_there_are_no_others(caplog: pytest.LogCaptureFixture) -> None:
    policy = ScriptedPolicy(writes("ab\0"))
    [tree] = grow(policy, TreeConfig(**SMALL, min_finished_tokens=5))
    assert len(tree.leaves) == 8 and tree.dropped == 2 * 5
    assert "tree.min_finished_tokens=5" in caplog.text


def test_a_token_budget_replaces_the_leaves() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.05))
    config = TreeConfig(
        segment=4, max_depth=5, budget="response_tokens", token_budget=200, max_width=32
    )
    counts = []
    for tree in grow(policy, config, ["P"] * 6):
        check_tree(tree, config)
        counts.append(len(tree.leaves))
        assert tree.flat_tokens <= 200 + 32 * 4
    assert len(set(counts)) > 1 and min(counts) >= 1


def test_trees_are_handed_out_as_they_finish() -> None:
    told: dict[int, Any] = {}
    policy = ScriptedPolicy(ends_with_chance(0.1))
    trees = grow(policy, TreeConfig(**SMALL), ["P", "Q"], on_done=told.__setitem__)
    assert [told[0], told[1]] == trees


def test_entries_of_a_prompt_become_leaves_of_its_trees() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.1))
    prompts = [torch.tensor(ids) for ids in [[80]] * 11 + [[81]] * 8 + [[82]]]
    made = rollout_trees(
        policy, prompts, sampler(20), tree=TreeConfig(**SMALL), seed=2, sequence_ids=range(20)
    )
    assert [t.prompt_ids.tolist() for t in made] == [p.tolist() for p in prompts]
    assert {t.detail["tree"]["pages_peak"] for t in made} == {0}  # cache none keeps no keys
    first, second = made[:8], made[8:11]
    highest = max(max(t.node_path) for t in first)
    assert min(min(t.node_path) for t in second) == highest + 1
    assert min(min(t.node_path) for t in made[11:19]) == 0 == made[19].node_path[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": "response_tokens", "token_budget": 100},
        {"fallback": "none"},
        {"long_prompt": "drop"},
    ],
)
def test_groups_need_their_size(changes: dict[str, Any]) -> None:
    policy = ScriptedPolicy(ends_with_chance(0.1))
    config = TreeConfig(**{**SMALL, **changes})
    with pytest.raises(ValueError, match="every group of rollouts has its size"):
        rollout_trees(
            policy, [torch.tensor([1])], sampler(20), tree=config, seed=0, sequence_ids=[0]
        )


def test_long_prompts() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.1))
    with pytest.raises(ValueError, match=r"prompt 1 has 4 tokens, more than tree\.max_prompt=3"):
        grow(policy, TreeConfig(**SMALL, max_prompt=3), ["abc", "abcd"])
    cut, dropped = (
        grow(policy, TreeConfig(**SMALL, max_prompt=3, long_prompt=what), ["abc", "abcd"])
        for what in ("truncate_left", "drop")
    )
    assert cut[1].prompt_ids.tolist() == [98, 99, 100] and len(cut[1].leaves) == 8
    assert [len(tree.leaves) for tree in dropped] == [8, 0]
    assert shape(cut[0]) == shape(dropped[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [""]}, "prompt 0 is empty"),
        ({"prompts": []}, "prompts is empty"),
        ({"leaves": [1, 2]}, "leaves must hold a number from 1 on for each of 1 prompts"),
        ({"leaves": [0]}, "leaves must hold a number from 1 on for each of 1 prompts"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"sequence_ids": [1, 2]}, "sequence_ids has 2 entries for 1 prompts"),
        ({"drawing": {"temperature": -1.0}}, "rollout.temperature must be a finite number"),
        ({"drawing": {"cache": "tree", "cache_page": 12}}, "rollout.cache_page must be a power"),
    ],
)
def test_bad_calls(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        grow(ScriptedPolicy(ends_with_chance(0.1)), TreeConfig(**SMALL), **options)


def test_paths_must_fit_the_model() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.1), max_length=20)
    with pytest.raises(ValueError, match=r"tree\.segment=4 times tree\.max_depth=5.*model's 20"):
        grow(policy, TreeConfig(**SMALL))
    assert grow(policy, TreeConfig(**SMALL), max_new_tokens=19)


def test_models_without_an_end_of_text_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no end-of-text token.*eos_ids="):
        grow(ScriptedPolicy(ends_with_chance(0.1), eos_ids=()), TreeConfig(**SMALL))


def test_logits_that_are_no_numbers_are_an_error() -> None:
    policy = ScriptedPolicy(ends_with_chance(0.1))
    stats = policy.stats

    def broken(*arguments: Any, **options: Any) -> Any:
        return stats(*arguments, **options)._replace(logprob=torch.full((2,), torch.nan))

    with pytest.raises(ValueError, match="logits are not finite"):
        grow(policy, TreeConfig(**SMALL), forward=broken)


@pytest.mark.parametrize(("prefer", "most"), [("low", ord("z")), ("high", ord("b"))])
def test_copies_go_to_the_preferred_log_probabilities(prefer: Any, most: int) -> None:
    def script(path: Sequence[int], uniform: float) -> int:
        if len(path) > 1:
            return ord("c")
        script.count += 1  # type: ignore[attr-defined]
        return ord("b") if script.count == 1 else ord("z")  # type: ignore[attr-defined]

    script.count = 0  # type: ignore[attr-defined]
    config = TreeConfig(
        leaves=6,
        segment=1,
        max_depth=4,
        share="logprob",
        share_prefer=prefer,
        share_temperature=0.01,
    )
    [tree] = grow(ScriptedPolicy(script), config)
    copies = {child.tokens[0]: len(child.children) for child in tree.root.children}
    assert copies == {most: 3, ord("b") + ord("z") - most: 1}
