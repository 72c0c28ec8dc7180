"""Decoding with kept keys on a CUDA device: recorded log-probabilities are those of a replay."""

import pytest
import torch

import dlm_fast
from dlm_fast.rollout import SamplerConfig, sample
from dlm_fast.rollout.replay import cache_gaps

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("page", [0, 3])
def test_the_block_cache_is_exact(device, page):
    policy = dlm_fast.load("tiny", kind="block", block_size=4, seed=1, device=device)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 90, (n,), generator=generator) for n in (9, 9, 4, 3)]
    config = SamplerConfig(
        max_new_tokens=13,
        block_size=4,
        steps=13,
        temperature=1.0,
        rule="threshold",
        bound=0.3,
        cache="block",
        cache_page=page,
    )
    for trajectory in sample(policy, prompts, config, 3, max_batch=3):
        # float32 products may be rounded to TF32 there
        assert cache_gaps(policy, trajectory, config).max() < 2e-2
