"""Keyed random numbers: published vectors, twin, laws of keys and counters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dlm_fast import _C
from dlm_fast.ops import Rng, Stream, gumbel, mix64, philox_uniform, philox_uniform_ref
from dlm_fast.ops.philox import philox4x32_ref, philox_words_ref

ONES = 0xFFFFFFFF
# The known answers that Random123 publishes for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    key64 = key[0] | (key[1] << 32)
    assert _C.philox4x32(*counter, key64) == words
    signed = torch.tensor(key64 - (1 << 64) if key64 >> 63 else key64)
    reference = philox4x32_ref([torch.tensor(c) for c in counter], signed)
    assert tuple(int(w) for w in reference) == words


@settings(max_examples=40, deadline=None)
@given(
    keys=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    columns=st.integers(0, 41),
    position=st.none() | st.integers(0, 2**31 - 1),
    step=st.none() | st.integers(0, 2**31 - 1),
    draw=st.integers(0, 2**32 - 1),
)
def test_bits_equal_the_definition(keys, columns, position, step, draw):
    rng = Rng(torch.tensor(keys, dtype=torch.int64)).at(position, step, draw)
    ours, reference = philox_uniform(rng, columns), philox_uniform_ref(rng, columns)
    assert ours.dtype == torch.float32 and ours.shape == (len(keys), columns)
    assert torch.equal(ours, reference)
    assert ((ours > 0) & (ours < 1)).all()


def test_counter_layout():
    rng = Rng(torch.tensor([99, 7])).at(position=torch.tensor([5, 6]), step=11, draw=13)
    words_RC = philox_words_ref(rng, 10)
    for row, (key, position) in enumerate([(99, 5), (7, 6)]):
        for column in range(10):
            block = _C.philox4x32(column >> 2, position, 11, 13, key)
            assert int(words_RC[row, column]) == block[column & 3]


def test_uniform_never_reaches_the_ends():
    # The extreme words: k = 0 and k = 2^23 - 1.
    word = torch.tensor([0, ONES])
    u = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    assert u.tolist() == [2.0**-24, 1 - 2.0**-24]
    assert torch.isfinite(gumbel(u)).all()


def test_rows_do_not_depend_on_the_batch():
    rng = Rng.of(3, Stream.TOKEN, list(range(9))).at(position=torch.arange(9), step=2)
    whole = philox_uniform(rng, 17)
    for r in range(9):
        assert torch.equal(philox_uniform(rng.take([r]), 17)[0], whole[r])
    order = torch.tensor([4, 4, 0, 8])
    assert torch.equal(philox_uniform(rng.take(order), 17), whole[order])
    assert torch.equal(philox_uniform(rng.take(torch.arange(9) % 2 == 0), 17), whole[::2])
    assert torch.equal(philox_uniform(rng, 5), whole[:, :5])
    assert philox_uniform(rng.take([]), 17).shape == (0, 17)


def test_strided_counters():
    rng = Rng(torch.arange(12)[::2], torch.arange(18, dtype=torch.int32)[::3])
    assert torch.equal(philox_uniform(rng, 6), philox_uniform_ref(rng, 6))


def test_thread_count_changes_nothing():
    rng = Rng.of(0, Stream.DATA, list(range(2000)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = philox_uniform(rng, 33)
        torch.set_num_threads(3)
        assert torch.equal(philox_uniform(rng, 33), one)
    finally:
        torch.set_num_threads(before)


def test_numbers_are_uniform():
    u = philox_uniform(Rng.of(1, Stream.TOKEN, list(range(500))), 1000).double().flatten()
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    # neighbouring columns and rows are uncorrelated
    grid = (u - 0.5).reshape(500, 1000) * 12**0.5
    for product in (grid[:, 1:] * grid[:, :-1], grid[1:] * grid[:-1]):
        assert abs(float(product.mean())) < 5 / product.numel() ** 0.5


def test_mix64():
    values = {mix64(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(values) == 12**3
    assert all(0 <= v < 2**63 for v in values)
    assert mix64(1, 2) != mix64(2, 1)
    assert len({mix64(), mix64(0), mix64(0, 0)}) == 3
    assert mix64(-1) == mix64(2**64 - 1)
    with pytest.raises(ValueError, match="64 bits"):
        mix64(2**64)
    with pytest.raises(TypeError):
        mix64(0.5)


def test_keys_are_mix64_of_seed_stream_and_id():
    ids = [0, 1, 5, -3, 2**63 - 1]
    expected = [mix64(42, Stream.UNMASK, i) for i in ids]
    assert Rng.of(42, Stream.UNMASK, ids).keys.tolist() == expected
    assert Rng.of(42, Stream.UNMASK, torch.tensor(ids)).keys.tolist() == expected
    assert Rng.of(42, Stream.UNMASK, [2**64 - 1]).keys.tolist() == [mix64(42, 2, 2**64 - 1)]
    assert Rng.of(42, Stream.UNMASK, np.array([0, 1])).keys.tolist() == expected[:2]
    assert len(Rng.of(42, Stream.UNMASK, [])) == 0
    streams = {int(Rng.of(42, stream, [0]).keys) for stream in Stream}
    assert len(streams) == len(Stream)


def test_at_keeps_what_is_not_given():
    rng = Rng.of(0, Stream.TOKEN, [1, 2]).at(position=3, draw=4).at(step=5)
    assert rng.position.tolist() == [3, 3] and rng.step.tolist() == [5, 5] and rng.draw == 4
    moved = rng.to("cpu")
    assert torch.equal(moved.keys, rng.keys) and torch.equal(moved.step, rng.step)


def test_counters_follow_their_keys_to_another_device():
    rng = Rng.of(0, Stream.TOKEN, [1, 2, 3]).at(position=7).to("meta")
    moved = rng.at(position=torch.arange(3), step=5)
    taken = moved.take(torch.tensor([2, 0]))
    for name in ("keys", "position", "step"):
        assert getattr(moved, name).is_meta and getattr(taken, name).shape == (2,)
    with pytest.raises(ValueError, match="step lies on meta but keys on cpu"):
        Rng(torch.tensor([1]), step=torch.zeros(1, dtype=torch.int32, device="meta"))


def test_bad_input():
    rng = Rng.of(0, Stream.TOKEN, [1, 2])
    with pytest.raises(TypeError, match="keys must be int64"):
        Rng(torch.zeros(2))
    with pytest.raises(ValueError, match="one dimension"):
        Rng(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"position must have the shape \[2\]"):
        Rng(rng.keys, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="draw"):
        rng.at(draw=-1)
    with pytest.raises(ValueError, match="step"):
        rng.at(step=-1)
    with pytest.raises(ValueError, match="columns"):
        philox_uniform(rng, -1)
    with pytest.raises(ValueError):
        Rng.of(0, 17, [0])
    with pytest.raises(ValueError, match="draw must fit"):
        _C.philox_uniform_cpu(0, 0, -1, 0, 0, 0, 0, 1)


def test_cuda_tensor_names_the_ways_out():
    with FakeTensorMode():
        keys = torch.zeros(2, dtype=torch.int64, device="cuda")
        with pytest.raises(ValueError, match=r"nvcc.*cupy13"):
            philox_uniform(Rng(keys), 4)


@pytest.mark.parametrize("counters", [False, True])
def test_opcheck(counters):
    keys = torch.tensor([1, 2, 3])
    counter = torch.tensor([4, 5, 6], dtype=torch.int32) if counters else None
    torch.library.opcheck(torch.ops.dlm_fast.philox_uniform, (keys, counter, counter, 1, 7))
