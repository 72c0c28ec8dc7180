"""Wrong input to ``sample``: every mistake is named before a forward runs."""

import dataclasses

import pytest
import torch
from mock_policy import MockPolicy
from torch import nn

from dlm_fast.rollout.sampler import sample
from dlm_fast.rollout.sampler_config import SamplerConfig

CONFIG = SamplerConfig(max_new_tokens=4, block_size=2, steps=2)
PROMPT = torch.tensor([1, 2])
MASK = 8


def policy_of(**options):
    return MockPolicy(torch.zeros(16, MASK + 1), **options)


@pytest.mark.parametrize(
    ("prompts", "kind", "words"),
    [
        ([], ValueError, "prompts is empty"),
        ("ab", TypeError, r"write sample\(policy, \[prompt\]"),
        (PROMPT, TypeError, r"write sample\(policy, \[prompt\]"),
        ([PROMPT, torch.tensor([], dtype=torch.int64)], ValueError, "prompt 1 is empty"),
        ([""], ValueError, "prompt 0 is empty"),
        ([[1, 2]], TypeError, "prompt 0 must be a text or an id tensor, got list"),
        ([PROMPT.float()], ValueError, "prompt 0 must be integer ids of shape"),
        ([PROMPT[None]], ValueError, r"prompt 0 must be integer ids.*\[1, 2\]"),
        ([PROMPT, torch.tensor([3, MASK])], ValueError, f"prompt 1 contains the mask id {MASK}"),
        ([torch.tensor([9])], ValueError, "prompt 0 contains id 9, outside the vocabulary of 9"),
        ([torch.tensor([-1])], ValueError, "prompt 0 contains id -1"),
    ],
)
def test_wrong_prompts(prompts, kind, words):
    policy = policy_of()
    with pytest.raises(kind, match=words):
        sample(policy, prompts, CONFIG)
    assert policy.batches == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sequence_ids": [1]}, "sequence_ids has 1 entries for 2 prompts"),
        ({"sequence_ids": [1, -1]}, "sequence_ids must be integers from 0 on"),
        ({"sequence_ids": [1, 2.5]}, "sequence_ids must be integers from 0 on"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"fixed_ids": [None]}, "fixed_ids has 1 entries for 2 prompts"),
        ({"fixed_ids": [None, PROMPT]}, r"fixed_ids\[1\] must be integer ids of shape"),
        ({"fixed_ids": [[1, 2, 3, 4], None]}, r"fixed_ids\[0\].*got list"),
        ({"fixed_ids": [torch.zeros(4), None]}, r"fixed_ids\[0\].*float32"),
        ({"fixed_ids": [torch.full((4,), 9), None]}, r"fixed_ids\[0\] contains id 9"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        sample(policy_of(), [PROMPT, PROMPT], CONFIG, **arguments)


def test_hints_behind_the_end_of_text_are_not_lost_in_silence():
    config = SamplerConfig(max_new_tokens=4, block_size=2, steps=2, stop_at_eos=True)
    hint = torch.tensor([MASK, MASK, 1, 2])
    assert len(sample(policy_of(kind="block", block_size=2), [PROMPT], config, fixed_ids=[hint]))
    with pytest.raises(ValueError, match=r"set rollout\.stop_at_eos=false"):
        sample(policy_of(), [PROMPT], config, fixed_ids=[hint])


def test_too_long_for_the_model():
    policy = policy_of(max_length=6)
    assert len(sample(policy, [PROMPT], CONFIG)) == 1
    words = "prompt 0 of 3 tokens plus 4 new ones exceeds the model's 6; shorten the prompt or"
    with pytest.raises(ValueError, match=words):
        sample(policy, [torch.tensor([1, 2, 3])], CONFIG)


def test_models_without_a_mask():
    policy = policy_of()
    policy.family = dataclasses.replace(policy.family, mask_id=None)
    with pytest.raises(ValueError, match=r"has no mask id.*mask_id="):
        sample(policy, [PROMPT], CONFIG)


def test_block_models_fix_the_block_size():
    words = r"rollout\.block_size=2 differs from the model's own blocks of 4; set rollout\.block"
    with pytest.raises(ValueError, match=words):
        sample(policy_of(kind="block", block_size=4), [PROMPT], CONFIG)


@pytest.mark.parametrize(
    ("cache", "kind", "words"),
    [
        (
            "block",
            "full",
            r"rollout\.cache=block .* needs a block model.*set rollout\.cache to none",
        ),
        ("prefix", "block", r"rollout\.cache=prefix approximates.*set rollout\.cache=block"),
        ("dual", "block", r"rollout\.cache=dual approximates.*set rollout\.cache=block"),
    ],
)
def test_caches_fit_the_kind_of_model(cache, kind, words):
    config = SamplerConfig(max_new_tokens=4, block_size=2, steps=2, cache=cache)
    with pytest.raises(ValueError, match=words):
        sample(policy_of(kind=kind, block_size=2 if kind == "block" else None), [PROMPT], config)


def test_a_cache_does_not_hold_what_a_rule_of_the_whole_window_reads():
    class Rule:
        whole_window, may_idle = True, False

    config = SamplerConfig(max_new_tokens=4, block_size=2, steps=2, cache="block")
    with pytest.raises(ValueError, match=r"whole window.*set rollout\.cache=none"):
        sample(policy_of(kind="block", block_size=2), [PROMPT], config, rule=Rule())


def test_forbidden_ids_outside_the_vocabulary():
    config = SamplerConfig(max_new_tokens=4, block_size=2, steps=2, forbid_ids=(2, 9))
    with pytest.raises(ValueError, match=r"rollout\.forbid_ids \[9\] lie outside the vocabulary"):
        sample(policy_of(), [PROMPT], config)


def test_texts_are_encoded_and_ids_of_other_widths_accepted():
    policy = policy_of()
    first, second = sample(policy, ["bc", PROMPT.to(torch.int32)], CONFIG)
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist() == [1, 2]
    assert second.prompt_ids.dtype == torch.int64


def test_modes_and_gradients_are_left_as_they_were():
    policy = policy_of()
    policy.inner, policy.frozen = nn.Dropout(), nn.Dropout()
    policy.train()
    policy.frozen.eval()
    seen = []

    def forward(*args, **options):
        seen.append((policy.training, policy.inner.training, torch.is_grad_enabled()))
        return policy.stats(*args, **options)

    sample(policy, [PROMPT], CONFIG, forward=forward)
    assert set(seen) == {(False, False, False)}
    assert (policy.training, policy.inner.training, policy.frozen.training) == (True, True, False)

    def broken(*args, **options):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        sample(policy, [PROMPT], CONFIG, forward=broken)
    assert policy.training and policy.inner.training and not policy.frozen.training


def test_trajectories_own_their_memory():
    policy = policy_of()
    trajectories = sample(policy, [PROMPT] * 3, CONFIG)
    assert trajectories[0].response_ids.untyped_storage().nbytes() == 4 * 8
    trajectories[0].prompt_ids[0] = 7
    assert PROMPT.tolist() == [1, 2] and trajectories[1].prompt_ids.tolist() == [1, 2]
    assert [t.sequence_id for t in trajectories] == [0, 1, 2]
    assert {(t.seed, t.block_size) for t in trajectories} == {(0, 2)}
