"""Rows that end with the block of their end-of-text token: response, tail, record."""

import pytest
import torch
from mock_policy import MockPolicy, confident_table

from dlm_fast.rollout.sampler import sample
from dlm_fast.rollout.sampler_config import SamplerConfig

MASK = 12
EOS = 5
PROMPT = torch.arange(4)


@pytest.mark.parametrize("kind", ["full", "block"])
def test_a_row_stops_with_the_block_of_its_end_of_text(kind):
    tokens = [1, 2, 3, 4, 6, EOS, 7, 11, 8, 8, 8, 8]
    policy = MockPolicy(
        confident_table([EOS] * 4 + tokens, [0.9] * 16, MASK + 1),
        kind=kind,
        block_size=4 if kind == "block" else None,
        eos_ids=[EOS],
    )
    options = {"block_size": 4, "steps": 12, "stop_at_eos": True, "record_confidence": True}
    stopped = sample(policy, [PROMPT], SamplerConfig(max_new_tokens=12, **options))[0]
    assert stopped.response_ids.tolist() == tokens[:6]
    assert stopped.tail_ids.tolist() == tokens[6:8]
    assert stopped.step_map.shape == stopped.logp_rollout.shape == (8,)
    assert (stopped.step_map > 0).all() and (stopped.logp_rollout < 0).all()
    assert stopped.confidence.shape == (8,)
    assert (stopped.finish_reason, stopped.num_forwards) == ("eos", 8)
    # a window that ends inside the block has no more tail than was decoded
    options["steps"] = 7
    cut = sample(policy, [PROMPT], SamplerConfig(max_new_tokens=7, **options))[0]
    assert (cut.response_ids.tolist(), cut.tail_ids.tolist()) == (tokens[:6], [7])
    # without end of text all is response
    cut = sample(policy, [PROMPT], SamplerConfig(max_new_tokens=5, **{**options, "steps": 5}))[0]
    assert (cut.response_ids.tolist(), cut.tail_ids.tolist()) == (tokens[:5], [])
    assert cut.finish_reason == "length"


def test_end_of_text_in_the_prompt_or_in_a_given_block_stops_nothing():
    # P=3, B=4: the first block holds the prompt's last three tokens, all of them end of text
    tokens = [1, 2, 3, 4, 6, 7, 7, EOS, 8]
    policy = MockPolicy(
        confident_table([0] * 3 + tokens, [0.9] * 12, MASK + 1),
        kind="block",
        block_size=4,
        eos_ids=[EOS],
    )
    config = SamplerConfig(max_new_tokens=9, block_size=4, steps=9, stop_at_eos=True)
    trajectory = sample(policy, [torch.full((3,), EOS)], config)[0]
    assert trajectory.response_ids.tolist() == tokens[:8]
    assert trajectory.tail_ids.tolist() == [8]
    fixed = torch.tensor([MASK, EOS, EOS, EOS, EOS, MASK, MASK, MASK, 2])
    hinted = sample(policy, [torch.full((3,), EOS)], config, fixed_ids=[fixed])[0]
    assert hinted.response_ids.tolist() == [1, EOS, EOS, EOS, EOS, 7, 7, EOS]
    assert hinted.tail_ids.tolist() == [2]
    assert hinted.hint_mask.tolist() == [False, *[True] * 4, *[False] * 3]
