"""Tests of trees on real causal models: greedy paths, kept keys, tokens counted, few pages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_directories import write_family_directory
from tree_scripts import check_tree, sampler, shape

import dlm_fast
from dlm_fast.ops.tree_kv_pool import TreePoolExhausted
from dlm_fast.rollout import sample
from dlm_fast.rollout.causal import path_network
from dlm_fast.rollout.growing_tree import GrowingTree
from dlm_fast.rollout.path_network import PathNetwork
from dlm_fast.rollout.pooled_paths import PooledPaths
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_sampler import sample_trees

SMALL: dict[str, Any] = {"leaves": 6, "segment": 8, "max_depth": 4}
PROMPTS = [torch.tensor(ids) for ids in ([11, 12, 13], [9, 8, 7, 6, 5], [11, 12, 13])]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return dlm_fast.load("tiny", kind="causal", width=48, layers=2, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = Path(tmp_path_factory.mktemp("qwen2")) / "model"
    return dlm_fast.load(write_family_directory(directory, "qwen2", seed=5))


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[PathNetwork]:
    """Every network that trees are made with."""
    made: list[PathNetwork] = []

    def remembered(*arguments: Any) -> PathNetwork:
        made.append(path_network(*arguments))
        return made[-1]

    monkeypatch.setattr("dlm_fast.rollout.tree_sampler.path_network", remembered)
    return made


@pytest.mark.parametrize("cache", ["none", "tree"])
@pytest.mark.parametrize("name", ["tiny", "qwen2"])
def test_greedy_paths_are_flat_generation(
    name: str, cache: str, request: pytest.FixtureRequest
) -> None:
    policy = request.getfixturevalue(name)
    greedy = sampler(32, temperature=0.0)
    flat = sample(policy, PROMPTS, greedy)
    config = TreeConfig(**SMALL, repetition="none")
    drawing = sampler(32, temperature=0.0, cache=cache)
    for one, tree in zip(flat, sample_trees(policy, PROMPTS, drawing, config), strict=True):
        for path in tree.trajectories(seed=0, block_size=1):
            assert path.response_ids.tolist() == one.response_ids.tolist()
            assert torch.allclose(path.logp_rollout, one.logp_rollout, atol=1e-4)


@pytest.mark.parametrize("sync", ["tree", "path"])
@pytest.mark.parametrize("name", ["tiny", "qwen2"])
def test_kept_keys_change_no_tree(name: str, sync: str, request: pytest.FixtureRequest) -> None:
    policy = request.getfixturevalue(name)
    config = TreeConfig(**SMALL, sync=sync, cut_window=3, allow_split=True)
    whole, kept = (
        sample_trees(policy, PROMPTS, sampler(32, cache=cache), config, seed=4)
        for cache in ("none", "tree")
    )
    for one, other in zip(whole, kept, strict=True):
        assert shape(one) == shape(other)
        check_tree(other, config)
        for path in other.trajectories(seed=4, block_size=1):
            assert torch.allclose(path.logp_rollout, _exact(policy, path), atol=1e-4)


def _exact(policy: Any, trajectory: Any) -> torch.Tensor:
    """Log-probabilities of a response in one forward of its own."""
    ids_L = trajectory.input_ids
    logits_LV = policy.logits(ids_L[None], aligned=True)[0].detach()
    logits_LV[:, list(sampler(1).never_drawn(policy.family))] = -torch.inf
    logprob_LV = logits_LV[trajectory.prompt_length :].log_softmax(-1)
    return logprob_LV.gather(1, trajectory.response_ids[:, None])[:, 0]


def test_one_path_is_a_flat_rollout(tiny: Any) -> None:
    config = TreeConfig(leaves=1, segment=8, max_depth=4, repetition="none")
    drawing = sampler(32, cache="tree")
    flat = sample(tiny, PROMPTS, drawing, seed=3)
    trees = sample_trees(tiny, PROMPTS, drawing, config, seed=3)
    for one, tree in zip(flat, trees, strict=True):
        [path] = tree.trajectories(seed=3, block_size=1)
        assert path.response_ids.tolist() == one.response_ids.tolist()


def test_every_token_goes_through_the_network_once(
    tiny: Any, networks: list[PathNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = 0

    def counted(self: GrowingTree, leaf: Any, uniform: float) -> Any:
        nonlocal again
        again += 1  # the last token before a cut predicts once more
        return cut(self, leaf, uniform)

    cut = GrowingTree._cut
    monkeypatch.setattr(GrowingTree, "_cut", counted)
    config = TreeConfig(**SMALL)
    trees = sample_trees(tiny, PROMPTS, sampler(32, cache="tree"), config, seed=4)
    [network] = networks
    ends = sum(len(tree.leaves) for tree in trees)  # nobody reads the last token of a leaf
    prompts = sum(prompt.numel() for prompt in PROMPTS)
    unique = sum(tree.unique_tokens for tree in trees)
    peak = network.pool.stats.peak_pages  # type: ignore[attr-defined]
    assert [tree.pages_peak for tree in trees] == [peak] * 3 and peak >= -(-unique // 16)
    assert network.tokens_forwarded == prompts + unique - ends + again
    assert unique < sum(tree.flat_tokens for tree in trees)


def test_forked_paths_draw_from_one_row(tiny: Any) -> None:
    asked: list[tuple[int, int]] = []

    def forward(ids_T: torch.Tensor, pattern: Any, *, rows: torch.Tensor, **options: Any) -> Any:
        asked.append((rows.numel(), len(set(rows.tolist()))))
        return tiny.stats(ids_T, pattern, rows=rows, **options)

    config = TreeConfig(leaves=8, first_branch=8, segment=8, max_depth=1, repetition="none")
    drawing = sampler(8, cache="tree", forbid_ids=tiny.family.eos_ids)
    sample_trees(tiny, PROMPTS[:1], drawing, config, forward=forward)
    assert asked == [(8, 1)] + [(8, 8)] * 7


@pytest.mark.parametrize("sync", ["tree", "global", "path"])
def test_trees_wait_for_pages_and_grow_the_same(
    tiny: Any, sync: str, networks: list[PathNetwork]
) -> None:
    config = TreeConfig(**SMALL, sync=sync)
    free = sample_trees(tiny, PROMPTS, sampler(32, cache="tree", cache_page=4), config, seed=6)
    most = networks[0].pool.stats.peak_pages  # type: ignore[attr-defined]
    drawing = sampler(32, cache="tree", cache_page=4, cache_pages=most * 2 // 3)
    tight = sample_trees(tiny, PROMPTS, drawing, config, seed=6)
    assert [shape(tree) for tree in free] == [shape(tree) for tree in tight]
    assert networks[1].tokens_forwarded > networks[0].tokens_forwarded  # some was computed again
    for network in networks:
        assert isinstance(network, PooledPaths)
        network.pool.check()
        assert network.pool.stats.used_pages == 0 == network.pool.stats.nodes


def test_a_tree_that_never_fits_says_so(tiny: Any) -> None:
    drawing = sampler(32, cache="tree", cache_page=4, cache_pages=5)
    with pytest.raises(TreePoolExhausted, match=r"one tree alone.*rollout\.cache_pages=5"):
        sample_trees(tiny, PROMPTS[:1], drawing, TreeConfig(**SMALL), seed=6)


def test_models_that_see_everything_grow_no_trees() -> None:
    policy = dlm_fast.load("tiny", width=16, layers=1, heads=2)
    with pytest.raises(ValueError, match="sees the whole sequence"):
        sample_trees(policy, PROMPTS, sampler(32), TreeConfig(**SMALL))


def test_training_mode_is_given_back(tiny: Any) -> None:
    tiny.train()
    try:
        sample_trees(tiny, PROMPTS[:1], sampler(32), TreeConfig(**SMALL))
        assert tiny.training
    finally:
        tiny.eval()
