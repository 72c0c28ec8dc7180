"""Tests of flat decoding of causal models: the definition, kept keys, batches, ends, bad input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_directories import write_family_directory

import dlm_fast
from dlm_fast.ops.tree_kv_pool import TreePoolExhausted
from dlm_fast.rollout import SamplerConfig, sample

TEXTS = ("12+30=", "7*8", "12+30=", "12+30=")
CACHES = ("none", "tree")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return dlm_fast.load("tiny", kind="causal", width=48, layers=2, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dlm_fast.load(
        write_family_directory(Path(tmp_path_factory.mktemp("qwen2")) / "model", "qwen2", seed=5)
    )


def config(**changes: Any) -> SamplerConfig:
    settings = {"max_new_tokens": 24, "block_size": 8, "steps": 24, **changes}
    return SamplerConfig(**settings)


def prompts_for(policy: Any) -> list[torch.Tensor]:
    if policy.tokenizer is not None and policy.family.model_type == "dlm_fast_tiny":
        return [policy.encode(text) for text in TEXTS]
    return [torch.tensor(ids) for ids in ([3, 4, 5], [9, 8, 7, 6, 5], [3, 4, 5], [3, 4, 5])]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["tiny", "qwen2"])
def test_greedy_decoding_takes_the_likeliest_token_after_each_prefix(
    name: str, cache: str, request: pytest.FixtureRequest
) -> None:
    policy = request.getfixturevalue(name)
    forbidden = config().never_drawn(policy.family)
    for trajectory in sample(policy, prompts_for(policy), config(cache=cache)):
        ids = trajectory.prompt_ids.tolist()
        for token, logprob in zip(
            trajectory.response_ids.tolist(), trajectory.logp_rollout.tolist(), strict=True
        ):
            logits_V = policy.logits(torch.tensor(ids)[None], aligned=False)[0, -1].detach()
            logits_V[list(forbidden)] = -torch.inf
            assert token == int(logits_V.argmax())
            assert logprob == pytest.approx(float(logits_V.log_softmax(0)[token]), abs=1e-4)
            ids.append(token)
        length = trajectory.response_length
        ended = ids[-1] in policy.family.eos_ids
        assert ended or length == 24
        assert trajectory.finish_reason == ("eos" if ended else "length")
        assert trajectory.step_map.tolist() == list(range(1, length + 1))
        assert trajectory.num_forwards == length and trajectory.block_size == 1


@pytest.mark.parametrize("cache", CACHES)
def test_a_row_draws_the_same_alone_and_in_any_batch(tiny: Any, cache: str) -> None:
    prompts, drawn = prompts_for(tiny), config(cache=cache, temperature=1.0)
    together = sample(tiny, prompts, drawn, seed=3)
    in_pairs = sample(tiny, prompts, drawn, seed=3, max_batch=2)
    assert len({tuple(t.response_ids.tolist()) for t in together}) == 4
    for row, (one, other) in enumerate(zip(together, in_pairs, strict=True)):
        alone = sample(tiny, [prompts[row]], drawn, seed=3, sequence_ids=[row])[0]
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.response_ids.tolist() == alone.response_ids.tolist()
        assert torch.allclose(one.logp_rollout, alone.logp_rollout, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "qwen2"])
def test_kept_keys_change_nothing(name: str, request: pytest.FixtureRequest) -> None:
    policy = request.getfixturevalue(name)
    whole, kept = (
        sample(policy, prompts_for(policy), config(cache=cache, temperature=0.8, top_p=0.9), seed=1)
        for cache in CACHES
    )
    for one, other in zip(whole, kept, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert torch.allclose(one.logp_rollout, other.logp_rollout, atol=1e-4)


def test_rows_wait_for_pages_and_draw_the_same(tiny: Any) -> None:
    prompts = prompts_for(tiny)
    free = sample(tiny, prompts, config(cache="tree", temperature=1.0), seed=3)
    # a prompt of one page and a response of six pages of four: two rows never fit
    tight = config(cache="tree", temperature=1.0, cache_page=4, cache_pages=9)
    for one, other in zip(free, sample(tiny, prompts, tight, seed=3), strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()


def test_one_row_that_does_not_fit_says_so(tiny: Any) -> None:
    small = config(cache="tree", cache_page=4, cache_pages=2)
    forbidden = {"forbid_ids": tuple(tiny.family.eos_ids)}
    with pytest.raises(TreePoolExhausted, match=r"one rollout alone.*rollout\.cache_pages=2"):
        sample(tiny, prompts_for(tiny)[:1], config(**forbidden, cache="tree", **_of(small)))


def _of(sampler: SamplerConfig) -> dict[str, Any]:
    return {"cache_page": sampler.cache_page, "cache_pages": sampler.cache_pages}


def test_any_end_of_text_token_ends_a_row(tiny: Any) -> None:
    plain = sample(tiny, prompts_for(tiny), config(temperature=1.0), seed=3)[0]
    stop = int(plain.response_ids[5])
    first = plain.response_ids.tolist().index(stop)
    family = tiny.family
    try:
        tiny.family = type(family)(**{**vars(family), "eos_ids": (*family.eos_ids, stop)})
        ended = sample(tiny, prompts_for(tiny), config(temperature=1.0), seed=3)[0]
    finally:
        tiny.family = family
    assert ended.response_ids.tolist() == plain.response_ids.tolist()[: first + 1]
    assert ended.finish_reason == "eos"


def test_rows_are_handed_out_as_they_finish(tiny: Any) -> None:
    told: dict[int, Any] = {}

    def take(rows: list[int], trajectories: list[Any]) -> None:
        told.update(zip(rows, trajectories, strict=True))

    made = sample(tiny, prompts_for(tiny), config(cache="tree", temperature=1.0), on_done=take)
    assert [told[row] for row in range(4)] == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "dynamic", "bound": 0.9}, "rollout.rule=dynamic has no meaning"),
        ({"confidence": "margin"}, "rollout.confidence=margin has no meaning"),
        ({"forbid_eos_confidence": True}, "rollout.forbid_eos_confidence=True has no meaning"),
        ({"cache": "dual"}, "rollout.cache=dual has no meaning; set it to none or tree"),
        ({"forbid_ids": (10**6,)}, "outside the vocabulary"),
    ],
)
def test_options_of_the_denoising_loop_are_refused(
    tiny: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        sample(tiny, prompts_for(tiny), config(**changes))


def test_arguments_of_the_denoising_loop_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="fixed_ids belongs to the denoising loop"):
        sample(tiny, prompts_for(tiny), config(), fixed_ids=[None] * 4)
    with pytest.raises(ValueError, match="max_batch must be at least 1"):
        sample(tiny, prompts_for(tiny), config(), max_batch=0)


def test_a_causal_model_without_a_shift_is_refused() -> None:
    policy = dlm_fast.load("tiny", kind="causal", logit_shift=0, width=16, layers=1, heads=2)
    with pytest.raises(ValueError, match="row i - 1 has to predict token i; its logit_shift is 0"):
        sample(policy, ["1+1"], config())


def test_flat_rows_of_block_models_take_the_cache_of_trees_as_their_own() -> None:
    policy = dlm_fast.load("tiny", kind="block", block_size=8, width=16, layers=1, heads=2)
    made = [
        sample(policy, ["1+1"] * 3, config(cache=cache, temperature=1.0), seed=2)
        for cache in ("block", "tree")
    ]
    for one, other in zip(*made, strict=True):
        assert torch.equal(one.response_ids, other.response_ids)
        assert torch.equal(one.logp_rollout, other.logp_rollout)


def test_models_that_see_everything_keep_no_keys_of_trees() -> None:
    policy = dlm_fast.load("tiny", width=16, layers=1, heads=2)
    with pytest.raises(ValueError, match=r"rollout\.cache=tree keeps the keys of paths"):
        sample(policy, ["1+1"], config(cache="tree"))


def test_pages_of_trees_are_powers_of_two() -> None:
    with pytest.raises(ValueError, match=r"rollout\.cache_page must be a power of two.*got 12"):
        config(cache="tree", cache_page=12)
