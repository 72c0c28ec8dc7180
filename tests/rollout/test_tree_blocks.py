"""Tests of trees on block-diffusion models: the grid, kept keys, scratch that stays out of them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tree_scripts import check_tree, sampler, shape

import dlm_fast
from dlm_fast.models.tree_rows import FillRows
from dlm_fast.ops import TreeKVPool
from dlm_fast.ops.visibility import Visibility
from dlm_fast.rollout import sample
from dlm_fast.rollout.path_nodes import PathNode
from dlm_fast.rollout.pooled_blocks import PooledBlocks
from dlm_fast.rollout.replay import replay_logprobs
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_sampler import rollout_trees, sample_trees

B = 4
PROMPTS = [torch.tensor(ids) for ids in ([11, 12, 13, 14, 15], [9, 8, 7, 6], [5, 6], [1] * 11)]
SMALL: dict[str, Any] = {"leaves": 6, "segment": 8, "max_depth": 4}
FALLS_BACK: dict[str, Any] = {"branch": 1, "fallback": "random"}


@pytest.fixture(scope="module")
def policy() -> Any:
    options = {"width": 48, "layers": 2, "heads": 2, "kv_heads": 1}
    return dlm_fast.load("tiny", kind="block", block_size=B, **options)


def drawing(**changes: Any) -> Any:
    return sampler(**{"max_new_tokens": 32, "block_size": B, "steps": 16, **changes})


@pytest.mark.parametrize("cache", ["none", "tree"])
@pytest.mark.parametrize(
    "rule",
    [{}, {"rule": "dynamic", "bound": 0.3}, {"confidence": "entropy"}, {"temperature": 0.0}],
    ids=str,
)
def test_one_path_is_a_flat_rollout(policy: Any, cache: str, rule: dict[str, Any]) -> None:
    flat = sample(policy, PROMPTS, drawing(stop_at_eos=True, **rule), seed=3)
    config = TreeConfig(leaves=1, segment=8, max_depth=5, repetition="none")
    trees = sample_trees(policy, PROMPTS, drawing(cache=cache, **rule), config, seed=3)
    for one, tree in zip(flat, trees, strict=True):
        [path] = tree.trajectories(seed=3, block_size=B)
        for name in ("response_ids", "tail_ids", "step_map"):
            assert torch.equal(getattr(one, name), getattr(path, name))
        assert torch.allclose(one.logp_rollout, path.logp_rollout, atol=1e-5)
        assert (one.num_forwards, one.finish_reason) == (path.num_forwards, path.finish_reason)


@pytest.mark.parametrize("sync", ["tree", "path"])
@pytest.mark.parametrize(
    "changes",
    [{}, FALLS_BACK, {**FALLS_BACK, "allow_split": True, "cut_window": 3}],
    ids=["plain", "fallback", "split"],
)
def test_kept_keys_change_no_tree(policy: Any, sync: str, changes: dict[str, Any]) -> None:
    config = TreeConfig(**SMALL, sync=sync, **changes)
    whole, kept, tight = (
        sample_trees(policy, PROMPTS, drawing(**cache), config, seed=4)
        for cache in (
            {"cache": "none"},
            {"cache": "tree"},
            {"cache": "tree", "cache_page": 4, "cache_pages": 60},
        )
    )
    for one, other, waited in zip(whole, kept, tight, strict=True):
        assert shape(one) == shape(other) == shape(waited)
        assert bool(one.fallbacks) == bool(changes)
        check_tree(other, config)
        for a, b in zip(*(t.trajectories(seed=4, block_size=B) for t in (one, other)), strict=True):
            assert torch.equal(a.step_map, b.step_map)
            assert torch.allclose(a.logp_rollout, b.logp_rollout, atol=1e-4)


@pytest.mark.parametrize("rule", [{}, {"rule": "dynamic", "bound": 0.3}], ids=str)
def test_log_probabilities_are_those_of_a_replay(policy: Any, rule: dict[str, Any]) -> None:
    sampling = drawing(cache="tree", **rule)
    for tree in sample_trees(policy, PROMPTS, sampling, TreeConfig(**SMALL, **FALLS_BACK), seed=4):
        for path in tree.trajectories(seed=4, block_size=B):
            exact_L = replay_logprobs(policy, path, sampling)
            torch.testing.assert_close(path.logp_rollout, exact_L, atol=1e-4, rtol=0)


def test_nodes_end_on_the_grid(policy: Any) -> None:
    config = TreeConfig(**SMALL, **FALLS_BACK, allow_split=True, cut_window=3)
    for tree in sample_trees(policy, PROMPTS, drawing(), config, seed=4):
        for node in tree.root.below():
            if node.children and node is not tree.root:
                assert node.stop % B == 0
        firsts = {len(child.tokens) for child in tree.root.children if child.children}
        tail = tree.prompt_ids.numel() % B
        assert all((tail + length) % B == 0 for length in firsts)


def kept_keys(policy: Any, monkeypatch: pytest.MonkeyPatch, numbers: Sequence[int]) -> Any:
    """prompt number -> path tokens -> keys and values of layer 1 of the path, as the pool had
    them at the end of the tree; and that nothing but finished blocks was in it."""
    found: dict[int, dict[tuple[int, ...], torch.Tensor]] = {}
    forget = PooledBlocks.forget

    def seen(self: PooledBlocks, nodes: Sequence[PathNode]) -> None:
        self.pool.check()
        for node in nodes:
            ids = self.pool.path_tokens(node.handle) if node.handle >= 0 else []
            if not ids:
                continue
            whole = node.path_tokens()
            assert ids == whole[: len(ids)] and len(ids) % B == 0
            assert len(whole) // B * B - len(ids) in (0, B)  # a leaf's last block is not kept
            key, value = self.pool.read(1, self.pool.path_slots(node.handle))
            found.setdefault(numbers_of[node.path()[0].key], {})[tuple(ids)] = torch.stack(
                [key, value]
            )
        forget(self, nodes)

    numbers_of = {number: number for number in numbers}
    with monkeypatch.context() as patched:
        patched.setattr(PooledBlocks, "forget", seen)
        sample_trees(
            policy,
            [PROMPTS[number] for number in numbers],
            drawing(cache="tree"),
            TreeConfig(**SMALL),
            seed=4,
            sequence_ids=numbers,
        )
    return found


def test_kept_keys_are_those_of_the_path_alone(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = kept_keys(policy, monkeypatch, range(4))
    for number, paths in together.items():
        alone = kept_keys(policy, monkeypatch, [number])[number]
        assert alone.keys() == paths.keys() and len(paths) > 6
        for ids, keys in paths.items():
            torch.testing.assert_close(keys, alone[ids], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(keys, exact_keys(policy, ids), atol=1e-5, rtol=1e-5)


def exact_keys(policy: Any, ids: Sequence[int]) -> torch.Tensor:
    pool = TreeKVPool(num_layers=2, key_heads=1, width=24)
    node = pool.alloc(ids)
    rows = FillRows.of(pool, Visibility.block_causal([len(ids)], B), pool.slots(node))
    with torch.no_grad():
        policy.stats(torch.tensor(ids), rows, rows=torch.arange(len(ids), dtype=torch.int32))
    return torch.stack(pool.read(1, pool.slots(node)))


def test_every_finished_block_is_kept_once(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    forward_keys = PooledBlocks._forward_keys

    def counted(self: PooledBlocks, ids: Sequence[int], rows: Any) -> None:
        asked.append(len(ids))
        forward_keys(self, ids, rows)

    monkeypatch.setattr(PooledBlocks, "_forward_keys", counted)
    config = TreeConfig(**SMALL)
    [tree] = sample_trees(policy, PROMPTS[:1], drawing(cache="tree"), config, seed=4)
    assert not tree.fallbacks
    assert not any(node.kept for node in tree.root.below())  # given back
    unique = tree.unique_tokens
    last = sum(len(leaf.node.tokens) - (len(leaf.node.tokens) - 1) // B * B for leaf in tree.leaves)
    tail = PROMPTS[0].numel() % B
    first_blocks = len(tree.root.children)  # each begins with the end of the prompt
    assert sum(asked) == PROMPTS[0].numel() - tail + unique - last + tail * first_blocks


def test_an_end_of_text_token_ends_a_path_and_leaves_a_tail(policy: Any) -> None:
    trees = sample_trees(policy, PROMPTS * 4, drawing(), TreeConfig(**SMALL), seed=9)
    ended = [
        trajectory
        for tree in trees
        for trajectory in tree.trajectories(seed=9, block_size=B)
        if trajectory.finish_reason == "eos"
    ]
    assert ended and any(t.tail_ids.numel() for t in ended)
    for trajectory in ended:
        eos = policy.family.eos_ids[0]
        assert trajectory.response_ids[-1] == eos and eos not in trajectory.response_ids[:-1]
        end = trajectory.input_ids.numel() + trajectory.tail_ids.numel()
        assert end % B == 0 or end == trajectory.prompt_length + 32
        decoded = trajectory.response_length + trajectory.tail_ids.numel()
        assert trajectory.step_map.numel() == decoded == trajectory.logp_rollout.numel()


def test_copies_are_shared_by_confidence(policy: Any) -> None:
    config = TreeConfig(**SMALL, share="logprob", share_prefer="high")
    one, other = (
        sample_trees(policy, PROMPTS[:2], drawing(cache=cache), config, seed=4)
        for cache in ("none", "tree")
    )
    assert [shape(tree) for tree in one] == [shape(tree) for tree in other]


def test_rollouts_say_their_blocks(policy: Any) -> None:
    made = rollout_trees(
        policy, PROMPTS[:1] * 6, drawing(), tree=TreeConfig(**SMALL), seed=1, sequence_ids=range(6)
    )
    assert {t.block_size for t in made} == {B} and len(made) == 6


@pytest.mark.parametrize("kind", ["causal", "block"])
def test_sixteen_bits_and_autocast(kind: str) -> None:
    options = {
        "kind": kind,
        "width": 48,
        "layers": 2,
        "heads": 2,
        **({"block_size": B} if kind == "block" else {}),
    }
    config = TreeConfig(**SMALL)
    half = dlm_fast.load("tiny", dtype="bfloat16", **options)
    [tree] = sample_trees(half, PROMPTS[:1], drawing(cache="tree"), config)
    check_tree(tree, config)
    full = dlm_fast.load("tiny", **options)
    with torch.autocast("cpu", torch.bfloat16):
        [tree] = sample_trees(full, PROMPTS[:1], drawing(cache="tree"), config)
    check_tree(tree, config)


@pytest.mark.parametrize(
    ("tree", "sampling", "message"),
    [
        ({"segment": 6}, {}, "tree.segment=6 does not end on the blocks of 4 tokens"),
        ({}, {"cache": "block"}, "rollout.cache=block keeps the keys of single rows"),
        ({}, {"block_size": 8}, "rollout.block_size=8 differs from the model's own blocks"),
    ],
)
def test_bad_options(
    policy: Any, tree: dict[str, Any], sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        sample_trees(policy, PROMPTS, drawing(**sampling), TreeConfig(**{**SMALL, **tree}))


def test_shifted_block_models_are_refused() -> None:
    shifted = dlm_fast.load(
        "tiny", kind="block", block_size=B, logit_shift=1, width=16, layers=1, heads=2
    )
    with pytest.raises(ValueError, match="trees of block models take a logit shift of 0"):
        sample_trees(shifted, PROMPTS, drawing(), TreeConfig(**SMALL))
