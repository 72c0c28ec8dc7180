"""Prefix and dual caches: what they forward, where they are exact, how far they are off else."""

import pytest
import torch

import dlm_fast
from dlm_fast.rollout import SamplerConfig, sample
from dlm_fast.rollout.replay import cache_gaps, replay_logprobs

MODES = [{"cache": "prefix"}, {"cache": "dual"}, {"cache": "prefix", "prefix_horizon": 3}]


def make_policy(layers, **options):
    options = {"width": 32, "heads": 2, "seed": 1, "kind": "full", **options}
    policy = dlm_fast.load("tiny", layers=layers, **options)
    with torch.no_grad():
        policy.lm_head.weight *= 12.0
    return policy


@pytest.fixture(scope="module", params=[0, 1])
def deep(request):
    return make_policy(3, logit_shift=request.param)


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 90, (n,), generator=generator) for n in lengths]


class Counted:
    """Runs ``policy.stats`` and notes the rows of each forward."""

    def __init__(self, policy):
        self.policy, self.forwards = policy, []

    def __call__(self, input_ids, visibility, **options):
        self.forwards.append((visibility.num_queries, visibility.num_keys))
        return self.policy.stats(input_ids, visibility, **options)


@pytest.mark.parametrize("logit_shift", [0, 1])
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_with_one_layer_they_are_exact(mode, logit_shift, temperature):
    # keys of the only layer depend on a token and its place alone, so none of them is ever stale
    policy = make_policy(1, logit_shift=logit_shift)
    options = {
        "max_new_tokens": 14,
        "block_size": 4,
        "steps": 10,
        "temperature": temperature,
        "rule": "dynamic",
        "bound": 0.6,
    }
    prompts = prompts_of(5, 1, 9)
    exact = sample(policy, prompts, SamplerConfig(**options), 3)
    cached = sample(policy, prompts, SamplerConfig(**options, **mode), 3, max_batch=2)
    for one, other in zip(cached, exact, strict=True):
        assert one.response_ids.equal(other.response_ids)
        assert one.step_map.equal(other.step_map)
        torch.testing.assert_close(one.logp_rollout, other.logp_rollout, atol=5e-5, rtol=1e-5)


def test_beyond_the_horizon_nothing_is_seen():
    policy = make_policy(1)
    prompt, width, size, horizon = prompts_of(5)[0], 12, 4, 2
    config = SamplerConfig(
        max_new_tokens=width,
        block_size=size,
        steps=width,
        cache="prefix",
        prefix_horizon=horizon,
        early_stop=False,
    )
    trajectory = sample(policy, [prompt], config)[0]
    mask_id, begin = policy.family.mask_id, len(prompt)
    for step in range(1, width + 1):
        column = int((trajectory.step_map == step).nonzero())
        ids = torch.cat([prompt, trajectory.response_ids])
        ids[begin:][trajectory.step_map >= step] = mask_id
        if (step - 1) % size:
            ids = ids[: begin + (column // size + 1) * size + horizon]
        with torch.no_grad():
            logits_SV = policy.logits(ids[None])[0]
        logits_SV[:, mask_id] = -torch.inf
        logits_SV[:, list(policy.family.unused_ids)] = -torch.inf
        wanted = logits_SV.log_softmax(-1)[begin + column, trajectory.response_ids[column]]
        torch.testing.assert_close(trajectory.logp_rollout[column], wanted, atol=5e-5, rtol=1e-5)


def expected_forwards(mode, prompt_length, width, size, shift):
    """(new rows, keys) of one row at one token a step."""
    total, counts = prompt_length + width, []
    for start in range(prompt_length, total, size):
        end = min(start + size, total)
        stop = min(end + mode.get("prefix_horizon", total), total)
        later = (end - start, total) if mode["cache"] == "dual" else (stop - start, stop)
        later = (later[0] + shift, later[1])
        counts += [(total, total)] + [later] * (end - start - 1)
    return counts


@pytest.mark.parametrize("mode", MODES)
def test_forwards_hold_what_the_mode_says(deep, mode):
    counted = Counted(deep)
    config = SamplerConfig(max_new_tokens=10, block_size=4, steps=10, early_stop=False, **mode)
    sample(deep, prompts_of(6), config, forward=counted)
    assert counted.forwards == expected_forwards(mode, 6, 10, 4, deep.family.logit_shift)


@pytest.mark.parametrize("mode", MODES)
def test_keys_before_the_block_stay_those_of_its_first_step(deep, mode):
    prompt, size, kept = prompts_of(6)[0], 4, []

    def forward(input_ids, visibility, **options):
        stats = deep.stats(input_ids, visibility, **options)
        start = len(prompt) + len(kept) // size * size
        kept.append(visibility.store.layer(2)[0][visibility.slots[0, :start]])
        return stats

    config = SamplerConfig(max_new_tokens=8, block_size=size, steps=8, early_stop=False, **mode)
    sample(deep, [prompt], config, forward=forward)
    for step, keys in enumerate(kept):
        assert keys.equal(kept[step // size * size])


@pytest.mark.parametrize("mode", MODES)
def test_a_row_decodes_the_same_alone_and_in_any_batch(deep, mode):
    config = SamplerConfig(
        max_new_tokens=10, block_size=4, steps=7, temperature=1.0, cache_pages=16, **mode
    )
    prompts = prompts_of(6, 11, 6, 3)
    together = sample(deep, prompts, config, 3)
    for index, one in enumerate(together):
        alone = sample(deep, prompts[index : index + 1], config, 3, sequence_ids=[index])[0]
        assert one.response_ids.equal(alone.response_ids)
        assert one.step_map.equal(alone.step_map)


@pytest.mark.parametrize("mode", MODES)
def test_the_first_step_of_a_block_is_exact_and_later_ones_are_off(deep, mode):
    config = SamplerConfig(max_new_tokens=12, block_size=4, steps=12, early_stop=False, **mode)
    for trajectory in sample(deep, prompts_of(7, 4), config):
        gap_N = (trajectory.logp_rollout - replay_logprobs(deep, trajectory, config, 5)).abs()
        is_first_N = (trajectory.step_map - 1) % 4 == 0
        assert gap_N[is_first_N].max() < 5e-5
        assert gap_N[~is_first_N].max() > 1e-4
        assert cache_gaps(deep, trajectory, config).mean() == gap_N.mean()


@pytest.mark.parametrize("kind", ["full", "block"])
def test_replayed_log_probabilities_are_those_of_exact_decoding(kind):
    policy = make_policy(2, kind=kind, block_size=4)
    eos = policy.family.eos_ids[0]
    others = tuple(i for i in range(6, policy.family.vocab_size) if i != eos)
    options = {"max_new_tokens": 16, "block_size": 4, "steps": 12, "forbid_ids": others}
    fixed = torch.full((16,), policy.family.mask_id)
    fixed[3], fixed[9] = 2, eos
    for stop in (True, False):
        config = SamplerConfig(**options, temperature=60.0, stop_at_eos=stop)
        hints = None if stop and kind == "full" else [fixed, None]
        made = sample(policy, prompts_of(6, 3), config, 2, fixed_ids=hints)
        for trajectory in made:
            assert cache_gaps(policy, trajectory, config).max() < 5e-5
            exact = replay_logprobs(policy, trajectory, config)
            assert (exact[trajectory.step_map == 0] == 0).all()


def test_data_has_no_steps_to_replay():
    trajectory = dlm_fast.rollout.Trajectory(
        prompt_ids=torch.tensor([1]), response_ids=torch.tensor([2])
    )
    config = SamplerConfig(max_new_tokens=4, block_size=4, steps=4)
    with pytest.raises(ValueError, match="was not sampled"):
        replay_logprobs(make_policy(1), trajectory, config)
