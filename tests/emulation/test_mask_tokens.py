"""The kernel of the Monte-Carlo masks, emulated: equal to the CPU backend and to the twin."""

from __future__ import annotations

import pytest
import torch
from device_runs import on_emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_problems import MASK, calls, check_equal, check_every_count, check_ragged, random_batch

from dlm_fast import _C
from dlm_fast.ops import Rng, Stream, mask_tokens
from dlm_fast.ops._executor import Emulated
from dlm_fast.ops.mask_samplers import SAMPLERS


@pytest.mark.covers("mask_fill")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ragged_sequences(run, sampler):
    check_ragged(run, sampler, [5, 31, 0, 1, 7, 33, 257])


@pytest.mark.covers("mask_fill")
def test_long_sequences():
    check_ragged(on_emulator("reverse"), "coupled", [3, 1000, 5000])


@pytest.mark.covers("mask_fill")
def test_every_count(run):
    check_every_count(run, 40)


@pytest.mark.covers("mask_fill")
def test_nearly_all_of_many_tokens(run):
    """The last chosen keys begin with the largest digits."""
    check_every_count(run, 1500, last=3)


@pytest.mark.covers("mask_fill")
def test_last_chosen_keys_that_differ_in_the_second_digit():
    """Some of the other keys differ from them in the last bit of the first digit alone."""
    check_every_count(on_emulator("forward"), 1500, step=5)


@settings(max_examples=80, deadline=None)
@given(calls(), st.sampled_from(Emulated.ORDERS), st.integers(0, 2**16))
def test_equals_the_definition(call, order, seed):
    check_equal(on_emulator(order, seed), *call)


def test_the_same_mistakes_are_refused(run):
    token_ids, maskable = random_batch(2, 5, maskable=1.1)
    options = {"sampler": "l_strat", "num_samples": 4}
    rng = Rng.of(0, Stream.MASK, [0, 1])
    token_ids[1, 3] = MASK
    with pytest.raises(ValueError, match=r"token_ids\[1, 3\] is mask_id=99"):
        run(mask_tokens, token_ids, maskable, MASK, rng=rng, **options)
    counts, start = torch.ones(1, 1, dtype=torch.int32), torch.tensor([0, 5])
    fill = (token_ids[0], maskable[0], start, rng.keys[:1], counts, MASK, False, [1, 0, 1, 0])
    with pytest.raises(ValueError, match="sum of counts"):
        run(torch.ops.dlm_fast.mask_fill, *fill, 2)


def test_plans():
    addresses = ((8,) * 5, (8,) * 3)
    name, grid, threads, cluster, shared, _ = _C.plan_mask_fill(
        3, 9, 4, 5, 0, False, MASK, *addresses
    )
    assert (name, grid, threads, cluster) == ("mask_fill", (15, 1), 256, 1)
    assert shared == 4 * (256 + 4 + 16)
    for wrong, match in [
        ((0, 1, 0, 1, 0), "no copies"),
        ((1, 1, 0, 0, 0), "no copies"),
        ((2**30, 8, 0, 8, 0), "below 2\\^31"),
        ((1, 4, 3, 2, 0), "must lie in"),
        ((1, 4, 0, 1, 2**32), "draw must fit"),
    ]:
        with pytest.raises(ValueError, match=match):
            _C.plan_mask_fill(*wrong, False, MASK, *addresses)
