"""SamplerConfig: every wrong option is named, every right one is accepted."""

import dataclasses

import pytest

from dlm_fast.rollout.sampler_config import BOUND_MEANINGS, QUOTA_RULES, SamplerConfig

SMALL = {"max_new_tokens": 8, "block_size": 4, "steps": 8}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("max_new_tokens", 0, "rollout.max_new_tokens must be a positive integer"),
        ("max_new_tokens", 2.5, "rollout.max_new_tokens must be a positive integer"),
        ("block_size", 0, "rollout.block_size must be a positive integer"),
        ("block_size", 9, "rollout.block_size must not exceed rollout.max_new_tokens=8"),
        ("steps", -1, "rollout.steps must be a positive integer"),
        ("steps", 9, "rollout.steps must not exceed rollout.max_new_tokens=8"),
        ("steps", 1, "rollout.steps=1 leaves some of the 2 blocks without a step"),
        ("steps", True, "rollout.steps must be a positive integer"),
        ("temperature", -0.1, "rollout.temperature"),
        ("temperature", float("nan"), "rollout.temperature"),
        ("temperature", float("inf"), "rollout.temperature"),
        ("top_k", -1, "rollout.top_k"),
        ("top_p", 0.0, "rollout.top_p"),
        ("top_p", 1.5, "rollout.top_p"),
        ("top_p", float("nan"), "rollout.top_p"),
        ("rule", "best", "rollout.rule must be one of"),
        ("confidence", "entropie", "rollout.confidence must be"),
        ("forbid_ids", (3, -1), "rollout.forbid_ids"),
        ("cache_page", -1, "rollout.cache_page must be a whole number from 0 on, got -1"),
        ("cache_page", None, "rollout.cache_page must be a whole number from 0 on, got None"),
        ("cache_pages", 0, "rollout.cache_pages must be a whole number from 1 on, got 0"),
        ("cache_pages", 2.5, "rollout.cache_pages must be a whole number from 1 on, got 2.5"),
        ("prefix_horizon", -1, "rollout.prefix_horizon must be a whole number from 0 on"),
        ("prefix_horizon", 4, "rollout.prefix_horizon has no meaning for rollout.cache=none"),
        ("bound", 0.9, "rollout.bound=0.9 has no meaning for rollout.rule=top_k"),
    ],
)
def test_wrong_option_is_named(option, value, words):
    with pytest.raises(ValueError, match=words):
        SamplerConfig(**{**SMALL, option: value})


@pytest.mark.parametrize("rule", sorted(BOUND_MEANINGS))
def test_rules_with_a_bound_demand_it(rule):
    with pytest.raises(ValueError, match=rf"rollout\.rule={rule} needs rollout\.bound"):
        SamplerConfig(**SMALL, rule=rule)
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"rollout\.bound must be a number from 0 on"):
            SamplerConfig(**SMALL, rule=rule, bound=bad)
    assert SamplerConfig(**SMALL, rule=rule, bound=0.5).bound == 0.5


@pytest.mark.parametrize("rule", ["dynamic", "threshold", "factor"])
def test_entropy_is_no_probability(rule):
    with pytest.raises(ValueError, match=r"rollout\.confidence to probability or margin"):
        SamplerConfig(**SMALL, rule=rule, bound=0.5, confidence="entropy")


def test_other_caches_are_refused():
    words = r"rollout\.cache='all' is not available: choose none, block"
    with pytest.raises(ValueError, match=words):
        SamplerConfig(**SMALL, cache="all")


@pytest.mark.parametrize("rule", QUOTA_RULES)
@pytest.mark.parametrize("confidence", ["probability", "margin"])
def test_rules_of_the_schedule_are_accepted(rule, confidence):
    bound = 0.9 if rule in BOUND_MEANINGS else None
    config = SamplerConfig(**SMALL, rule=rule, confidence=confidence, bound=bound)
    assert (config.rule, config.confidence) == (rule, confidence)


def test_it_is_frozen_and_keyword_only():
    config = SamplerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    with pytest.raises(TypeError):
        SamplerConfig(8)


@pytest.mark.parametrize(("window", "block", "count"), [(8, 4, 2), (9, 4, 3), (4, 4, 1), (5, 1, 5)])
def test_number_of_blocks(window, block, count):
    config = SamplerConfig(max_new_tokens=window, block_size=block, steps=window)
    assert config.num_blocks == count
