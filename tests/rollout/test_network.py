"""The loop against a network: a slow definition, replayed log-probabilities, batch invariance."""

import pytest
import torch

import dlm_fast
from dlm_fast.ops import Rng, Stream, gumbel, philox_uniform_ref
from dlm_fast.rollout import SamplerConfig, sample

KINDS = {
    "full": {"kind": "full"},
    "full-shift": {"kind": "full", "logit_shift": 1},
    "block": {"kind": "block", "block_size": 4},
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def policy(request):
    policy = dlm_fast.load("tiny", width=32, layers=2, heads=2, seed=1, **KINDS[request.param])
    with torch.no_grad():
        policy.lm_head.weight *= 12.0  # an untrained head is nearly flat: every choice a near tie
    return policy


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 90, (n,), generator=generator) for n in lengths]


def masked_log_probs(policy, ids, temperature=1.0):
    """[S, V] aligned, without the mask id; one row, no packing."""
    logits_SV = policy.logits(ids[None])[0].detach().clone()
    logits_SV[:, policy.family.mask_id] = -torch.inf
    return (logits_SV / temperature).log_softmax(-1)


def slow_sample(policy, prompt, config, seed, sequence_id):
    """The definition for scheduled rules: one row, all logits at every step, lists."""
    size, width = config.block_size, config.max_new_tokens
    ids = torch.cat([prompt, torch.full((width,), policy.family.mask_id)])
    begin, total, step = len(prompt), len(ids), 0
    step_map = [0] * width
    start = begin
    while start < total:
        grid = start // size * size if policy.family.kind == "block" else start
        end = min(grid + size, total)
        num_steps = (end - start) * config.steps // width
        for t in range(num_steps):
            log_probs_SV = masked_log_probs(policy, ids)
            candidates = []
            for p in range(start, end):
                if ids[p] != policy.family.mask_id:
                    continue
                noisy_V = log_probs_SV[p]
                if config.temperature > 0:
                    rng = Rng.of(seed, Stream.TOKEN, [sequence_id]).at(position=p, step=step)
                    uniform_V = philox_uniform_ref(rng, len(noisy_V))[0]
                    noisy_V = noisy_V / config.temperature + gumbel(uniform_V)
                token = int(noisy_V.argmax())
                candidates.append((-float(log_probs_SV[p, token]), p, token))
            quota = (end - start) // num_steps + (t < (end - start) % num_steps)
            step += 1
            for _, p, token in sorted(candidates)[:quota]:
                ids[p], step_map[p - begin] = token, step
        start = end
    return ids[begin:].tolist(), step_map


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_equals_the_slow_definition(policy, temperature):
    config = SamplerConfig(
        max_new_tokens=12, block_size=4, steps=12, temperature=temperature, early_stop=False
    )
    prompts = prompts_of(8, 3, 5, 1)
    for row, trajectory in enumerate(sample(policy, prompts, config, seed=9)):
        ids, step_map = slow_sample(policy, prompts[row], config, 9, row)
        assert trajectory.response_ids.tolist() == ids
        assert trajectory.step_map.tolist() == step_map


def test_it_equals_the_slow_definition_with_several_tokens_a_step(policy):
    # prompts on the grid, so that the slow definition's even shares hold for block models too
    config = SamplerConfig(max_new_tokens=12, block_size=4, steps=6, early_stop=False)
    for trajectory, prompt in zip(
        sample(policy, prompts_of(8, 4), config), prompts_of(8, 4), strict=True
    ):
        ids, step_map = slow_sample(policy, prompt, config, 0, 0)
        assert (trajectory.response_ids.tolist(), trajectory.step_map.tolist()) == (ids, step_map)


def test_recorded_log_probabilities_are_those_of_a_replay(policy):
    config = SamplerConfig(
        max_new_tokens=10, block_size=4, steps=5, temperature=1.0, record_confidence=True
    )
    for trajectory in sample(policy, prompts_of(6, 3), config, seed=2):
        prompt_length, mask_id = trajectory.prompt_length, policy.family.mask_id
        for step in range(1, int(trajectory.step_map.max()) + 1):
            ids = trajectory.input_ids.clone()
            hidden = trajectory.step_map >= step
            ids[prompt_length:][hidden] = mask_id
            log_probs_SV = masked_log_probs(policy, ids)[prompt_length:]
            here = trajectory.step_map == step
            replayed = log_probs_SV[here].gather(1, trajectory.response_ids[here][:, None])[:, 0]
            torch.testing.assert_close(
                trajectory.logp_rollout[here], replayed, atol=3e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                trajectory.confidence[here], replayed.exp(), atol=3e-5, rtol=1e-4
            )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_of_four_equals_four_batches_of_one(policy, temperature):
    config = SamplerConfig(max_new_tokens=16, block_size=4, steps=8, temperature=temperature)
    prompts = prompts_of(9, 4, 9, 13)
    together = sample(policy, prompts, config, seed=3)
    alone = [
        sample(policy, [prompt], config, seed=3, sequence_ids=[row])[0]
        for row, prompt in enumerate(prompts)
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.response_ids.equal(other.response_ids)
        assert one.step_map.equal(other.step_map)
        assert one.num_forwards == other.num_forwards
        torch.testing.assert_close(one.logp_rollout, other.logp_rollout, atol=3e-5, rtol=1e-5)


def test_texts_come_back_as_text():
    policy = dlm_fast.load("tiny", width=16, layers=1, heads=2)
    config = SamplerConfig(max_new_tokens=6, block_size=3, steps=6, temperature=1.0)
    trajectory = dlm_fast.sample(policy, ["1 + 2 ="], config, seed=4)[0]
    assert policy.decode(trajectory.prompt_ids) == "1 + 2 ="
    assert 0 < len(policy.decode(trajectory.response_ids)) <= 6


@pytest.mark.parametrize("name", ["llada", "dream", "sdar"])
def test_a_checkpoint_decodes_like_the_slow_definition(shared_data, name):
    policy = dlm_fast.load(shared_data / "checkpoints" / f"{name}_tiny")
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, policy.family.mask_id, (7,), generator=generator)
    config = SamplerConfig(
        max_new_tokens=8, block_size=4, steps=8, temperature=0.6, early_stop=False
    )
    trajectory = sample(policy, [prompt], config, seed=6)[0]
    ids, step_map = slow_sample(policy, prompt, config, 6, 0)
    assert (trajectory.response_ids.tolist(), trajectory.step_map.tolist()) == (ids, step_map)
