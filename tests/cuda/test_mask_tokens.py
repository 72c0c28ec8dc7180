"""The Monte-Carlo masks on a CUDA device: equal to the CPU backend and to the twin."""

from __future__ import annotations

import pytest
from device_runs import on_device
from hypothesis import given, settings
from mask_problems import (
    MASK,
    assert_same,
    calls,
    check_equal,
    check_every_count,
    check_ragged,
    random_batch,
    rng_of,
)

from dlm_fast.ops import mask_tokens
from dlm_fast.ops.mask_samplers import SAMPLERS

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ragged_sequences(run, sampler):
    check_ragged(run, sampler, [5, 31, 0, 1, 7, 33, 257, 1000, 5000])


def test_every_count(run):
    check_every_count(run, 600)


@settings(max_examples=200, deadline=None)
@given(call=calls())
def test_equals_the_definition(device, call):
    check_equal(on_device(device), *call)


def test_keys_may_stay_on_the_cpu(device):
    token_ids, maskable = random_batch(3, 50)
    options = {"sampler": "coupled", "num_samples": 4, "rng": rng_of(3)}
    masked = mask_tokens(token_ids.to(device), maskable.to(device), MASK, **options)
    assert masked.noisy_ids.device == masked.rows.device == masked.targets.device == device
    assert masked.counts.is_cpu and masked.weights.is_cpu
    assert_same(
        type(masked)(*(t.cpu() for t in masked)), mask_tokens(token_ids, maskable, MASK, **options)
    )


def test_a_token_masked_already_is_refused(run):
    token_ids, maskable = random_batch(2, 5, maskable=1.1)
    token_ids[1, 3] = MASK
    with pytest.raises(ValueError, match=r"token_ids\[1, 3\] is mask_id=99"):
        run(mask_tokens, token_ids, maskable, MASK, sampler="l_iid", num_samples=1, rng=rng_of(2))
