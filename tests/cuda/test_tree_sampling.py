"""Trees of rollouts on a CUDA device: recorded log-probabilities are those of whole forwards."""

import pytest
import torch

import dlm_fast
from dlm_fast.rollout import SamplerConfig, TreeConfig, sample_trees
from dlm_fast.rollout.replay import replay_logprobs

pytestmark = pytest.mark.cuda

TREE = TreeConfig(leaves=6, segment=8, max_depth=3, branch=2, fallback="random")
CLOSE = 2e-2
"""float32 products may be rounded to TF32 there"""


def drawing(**changes):
    return SamplerConfig(
        max_new_tokens=24, block_size=4, steps=24, temperature=1.0, cache="tree", **changes
    )


def prompts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 90, (n,), generator=generator) for n in (9, 4, 3)]


@pytest.mark.parametrize("pages", [None, 60])
def test_causal_trees(device, pages):
    policy = dlm_fast.load("tiny", kind="causal", seed=1, device=device)
    sampler = drawing(cache_page=4, cache_pages=pages)
    forbidden = list(sampler.never_drawn(policy.family))
    for tree in sample_trees(policy, prompts(), sampler, TREE, 3):
        assert len(tree.leaves) == 6
        for path in tree.trajectories(seed=3, block_size=1):
            with torch.no_grad():
                logits_LV = policy.logits(path.input_ids[None].to(device))[0].cpu()
            logits_LV[:, forbidden] = -torch.inf
            logprob_RV = logits_LV[path.prompt_length :].log_softmax(-1)
            exact_R = logprob_RV.gather(1, path.response_ids[:, None])[:, 0]
            assert (path.logp_rollout - exact_R).abs().max() < CLOSE


@pytest.mark.parametrize("pages", [None, 60])
def test_block_trees(device, pages):
    policy = dlm_fast.load("tiny", kind="block", block_size=4, seed=1, device=device)
    sampler = drawing(cache_page=4, cache_pages=pages)
    for tree in sample_trees(policy, prompts(), sampler, TREE, 3):
        assert len(tree.leaves) == 6
        for path in tree.trajectories(seed=3, block_size=4):
            exact_L = replay_logprobs(policy, path, sampler)
            assert (path.logp_rollout - exact_L).abs().max() < CLOSE
