"""Problems for the mask sampler, and what must hold wherever they are solved."""

from __future__ import annotations

import torch
from device_runs import Run
from hypothesis import strategies as st
from torch import Tensor

from dlm_fast.ops import Masked, Rng, Stream, mask_tokens, mask_tokens_ref
from dlm_fast.ops.mask_samplers import PAIRED, SAMPLERS

MASK = 99


def random_batch(rows: int, size: int, seed: int = 0, maskable: float = 0.7):
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, MASK, (rows, size), generator=generator)
    return token_ids, torch.rand(rows, size, generator=generator) < maskable


def rng_of(rows: int, seed: int = 0) -> Rng:
    return Rng.of(seed, Stream.MASK, list(range(rows)))


@st.composite
def calls(draw):
    """Ids, maskable and options of a few short ragged sequences."""
    sampler = draw(st.sampled_from(SAMPLERS))
    pairs = draw(st.integers(1, 4))
    num_samples = 2 * pairs if sampler in PAIRED else draw(st.integers(1, 7))
    first = draw(st.integers(0, num_samples - 1))
    count = draw(st.integers(1, num_samples - first))
    seed = draw(st.integers(0, 2**40))
    lengths = draw(st.lists(st.integers(0, 12), max_size=4))
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, MASK, (total,), generator=generator)
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    maskable = torch.rand(total, generator=generator) < share
    rng = rng_of(len(lengths), seed).at(draw=draw(st.integers(0, 2**32 - 1)))
    options = {"sampler": sampler, "num_samples": num_samples, "first": first, "count": count}
    return token_ids, maskable, options | {"rng": rng, "lengths": lengths}


def assert_same(ours: Masked, theirs: Masked) -> None:
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def check_equal(run: Run, token_ids: Tensor, maskable: Tensor, options: dict) -> Masked:
    """The backend that ``run`` reaches equals the CPU backend and the twin, bit for bit."""
    masked = run(mask_tokens, token_ids, maskable, MASK, **options)
    assert_same(masked, mask_tokens(token_ids, maskable, MASK, **options))
    assert_same(masked, mask_tokens_ref(token_ids, maskable, MASK, **options))
    return masked


def check_ragged(run: Run, sampler: str, lengths: list[int]) -> None:
    """Sequences of many lengths: with a prompt, with nothing maskable, all maskable."""
    token_ids, maskable = random_batch(1, sum(lengths), seed=len(lengths), maskable=0.6)
    spans = maskable[0].split(lengths)
    spans[0][:] = False
    spans[-1][:] = True
    spans[1][: lengths[1] // 2] = False
    num_samples = 6
    for first, count, draw in [(0, 3, 0), (3, 2, 2**32 - 1)]:
        check_equal(
            run,
            token_ids[0],
            maskable[0],
            {
                "sampler": sampler,
                "num_samples": num_samples,
                "first": first,
                "count": count,
                "rng": rng_of(len(lengths), seed=5).at(draw=draw),
                "lengths": lengths,
            },
        )


def check_every_count(run: Run, size: int, last: int = 0, step: int = 1) -> None:
    """Copies that mask 0, 1, ... all of their tokens (the `last` of these, where given, and every
    `step`-th), on both sides of a pair: the smallest keys, the rest, and nothing else."""
    token_ids, maskable = random_batch(2, size)
    length = int(maskable[0].sum())
    maskable[1] = maskable[0]
    counts = torch.arange(length + 1, dtype=torch.int32)[-last::step].expand(2, -1)
    start, keys = torch.tensor([0, size, 2 * size]), rng_of(2).keys
    flat = (token_ids.reshape(-1), maskable.reshape(-1), start, keys)
    for paired in (False, True):
        samples = [2 * length + 2, 0 if paired else 3, counts.shape[1], 9]
        args = (*flat, counts, MASK, paired, samples, int(counts.sum()))
        fill = torch.ops.dlm_fast.mask_fill
        for ours, theirs in zip(run(_call, fill, *args), fill(*args), strict=True):
            assert torch.equal(ours, theirs)


def _call(op, *args):
    return op(*args)
