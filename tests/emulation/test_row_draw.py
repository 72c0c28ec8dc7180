"""The row kernels that choose tokens against the definition, in float64, and the op on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from token_rows import Rows, equal_noise, on_cpu, same_numbers
from torch import Tensor

from dlm_fast.ops import Rng, Stream, token_stats_ref
from dlm_fast.ops._common import extension
from dlm_fast.ops._executor import Emulated
from dlm_fast.ops.philox import gumbel, philox_uniform_ref


def keyed(count: int, seed: int = 0, **counters: Tensor | int) -> Rng:
    return Rng.of(seed, Stream.TOKEN, list(range(count))).at(**counters)


def padded(logits_NV: Tensor) -> Tensor:
    """The same rows, a multiple of four elements apart, with NaN between them."""
    rows, vocabulary = logits_NV.shape
    buffer = torch.full((rows, (vocabulary + 3) // 4 * 4), torch.nan)
    buffer[:, :vocabulary] = logits_NV
    return buffer[:, :vocabulary]


def draw(executor: Emulated, logits_NV: Tensor, **options) -> dict[str, Tensor]:
    return draw_there(executor, padded(logits_NV), **options)


def draw_there(
    executor: Emulated, logits_NV: Tensor, *, top_k: int = 0, top_p: float = 1.0, **options
) -> dict[str, Tensor]:
    """Of the logits where they lie."""
    rows = Rows(*logits_NV.shape, **options)
    plan = extension().plan_row_draw(
        rows.bound, (logits_NV.data_ptr(), logits_NV.stride(0)), top_k, top_p
    )
    executor.launch(plan, logits_NV.device)
    return rows.out


def truth_of(logits_NV: Tensor, targets: Tensor | None = None, **options):
    return token_stats_ref(
        logits_NV.double(), torch.eye(logits_NV.shape[1]).double(), targets, **options
    )


def random_logits(count: int, vocabulary: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    return scale * torch.randn(count, vocabulary, generator=generator)


@pytest.mark.covers("row_draw_all")
@pytest.mark.parametrize("vocabulary", [5, 97, 517, 5003])
def test_argmax_and_draws(executor, vocabulary):
    logits = random_logits(3, vocabulary)
    targets = torch.tensor([vocabulary - 1, -100, 0])
    ours = draw(executor, logits, targets=targets)
    truth = truth_of(logits, targets)
    assert torch.equal(ours["token"], truth.token)
    same_numbers(ours, truth)
    rng = keyed(3, position=torch.tensor([4, 5, 6], dtype=torch.int32), step=2, draw=9)
    ours = draw(executor, logits, rng=rng, draw_temperature=1.4)
    truth = truth_of(logits, rng=rng, temperature=1.4)
    assert torch.equal(ours["token"], truth.token)
    same_numbers(ours, truth)


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_k": 40, "top_p": 0.5},
    {"top_k": 10**6, "top_p": 0.999},
]


@pytest.mark.covers("row_draw_filtered")
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filtered_draws(executor, options):
    for vocabulary in (5, 97, 1031):
        logits = random_logits(6, vocabulary)
        rng = keyed(6)
        ours = draw(executor, logits, rng=rng, draw_temperature=1.3, **options)
        truth = truth_of(logits, rng=rng, temperature=1.3, **options)
        assert torch.equal(ours["token"], truth.token)
        cpu = on_cpu(logits, torch.eye(vocabulary), rng=rng, temperature=1.3, **options)
        assert torch.equal(ours["token"], cpu.token)
        same_numbers(ours, truth)


def test_a_large_block(executor):
    logits = random_logits(2, 4501, 0.1)
    for options in ({"top_p": 0.9}, {"top_k": 3000, "top_p": 0.5}):
        ours = draw(executor, logits, rng=keyed(2), **options)
        truth = truth_of(logits, rng=keyed(2), temperature=1.0, **options)
        assert torch.equal(ours["token"], truth.token)


def test_filters_keep_exactly_what_they_say(executor):
    """Ties go to the lowest id; the smallest set that reaches the mass, at least one token."""
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, -50.0, 0.5, 2.0])
    share = logits.softmax(0)
    cases = [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 4}, {1, 2, 3, 4}),
        ({"top_p": 1e-13}, {1}),
        ({"top_p": share[1].item() * 1.01}, {1, 2}),
        ({"top_p": 3 * share[1].item() + 1e-5}, {1, 2, 3, 4}),
        # The mass is that of what top_k left: three equal tokens, two of them hold 0.66.
        ({"top_k": 3, "top_p": 0.66}, {1, 2}),
        ({"top_k": 3, "top_p": 0.67}, {1, 2, 4}),
        ({"top_k": 2, "top_p": 0.99}, {1, 2}),
    ]
    for options, expected in cases:
        ours = draw(executor, logits.expand(20, 8), rng=keyed(20), **options)
        assert set(ours["token"].tolist()) == expected, options


def test_filters_at_their_edges(executor):
    """Floats that differ in the last bit, a mass that is reached exactly, all columns but one."""
    one, next_one = 1.0, 1.0 + 2.0**-23
    cases = [
        ([one, next_one, -9.0], {"top_k": 1}, {1}),
        ([one, next_one, -9.0], {"top_k": 2}, {0, 1}),
        ([0.0] * 4, {"top_p": 0.5}, {0, 1}),
        ([0.0] * 5, {"top_k": 4}, {0, 1, 2, 3}),
    ]
    for logits, options, expected in cases:
        ours = draw(
            executor, torch.tensor(logits).expand(40, len(logits)), rng=keyed(40), **options
        )
        assert set(ours["token"].tolist()) == expected, options


def test_both_zeros_are_equal(executor):
    logits = torch.tensor([-1.0, 0.0, -0.0, 0.0, -0.0]).expand(20, 5)
    for count in (1, 2, 3):
        ours = draw(executor, logits, rng=keyed(20), top_k=count)
        assert set(ours["token"].tolist()) == set(range(1, count + 1))


def test_equal_scores_go_to_the_lowest_id(executor):
    rng, logits = equal_noise(600, 20)
    for options in ({}, {"top_k": 2}):
        ours = draw(executor, logits, rng=rng, **options)
        assert torch.equal(ours["token"], logits.nonzero()[::2, 1])
        assert (ours["margin"] == 0).all()


def test_neighbours_with_equal_scores(executor):
    """In one thread's four, and as the last thread's and the first one's; noise does not count."""
    logits = torch.zeros(2, 600)
    logits[0, [8, 9]] = logits[1, [511, 512]] = 1e9
    for options in ({}, {"top_k": 2}):
        assert draw(executor, logits, rng=keyed(2), **options)["token"].tolist() == [8, 511]


def test_the_first_column_is_drawn_as_others_are(executor):
    logits = torch.tensor([0.0, 0.5]).expand(20, 2)
    ours = draw(executor, logits, rng=keyed(20))
    truth = truth_of(logits, rng=keyed(20), temperature=1.0)
    assert torch.equal(ours["token"], truth.token) and set(ours["token"].tolist()) == {0, 1}
    same_numbers(ours, truth)


def test_ties_of_far_ids(executor):
    """More equal logits than are kept, in every digit of the ids."""
    logits = torch.full((1, 70_000), -5.0)
    tied = [3, 255, 256, 300, 511, 65_535, 65_536, 69_999]
    logits[0, tied] = 0.0
    noise = gumbel(philox_uniform_ref(keyed(7), 70_000))[:, tied]
    for count in (1, 3, 6):
        ours = draw(executor, logits.expand(7, -1), rng=keyed(7), top_k=count)
        best = noise[:, :count].argmax(-1)
        assert torch.equal(ours["token"], torch.tensor(tied)[best])


def test_negative_and_forbidden_columns(executor):
    logits = random_logits(5, 61) - 100
    bias = torch.linspace(-1, 1, 61)
    forbidden = [0, 17, 60]
    for options in ({}, {"top_k": 9}, {"top_p": 0.7}, {"top_k": 59}, {"top_k": 60}):
        ours = draw(executor, logits, rng=keyed(5), bias=bias, forbid_ids=forbidden, **options)
        truth = truth_of(
            logits + bias, rng=keyed(5), temperature=1.0, forbid_ids=forbidden, **options
        )
        assert torch.equal(ours["token"], truth.token)
        same_numbers(ours, truth)


def test_rows_that_are_not_there(executor):
    logits = random_logits(4, 50)
    logits[2] = math.nan
    for options in ({}, {"rng": keyed(4)}, {"rng": keyed(4), "top_p": 0.5}):
        clean = draw(executor, random_logits(4, 50), **options)
        ours = draw(executor, logits, forbid_ids=[], **options)
        for name, value in ours.items():
            assert torch.equal(value[[0, 1, 3]], clean[name][[0, 1, 3]]), name
            assert name in ("token", "row_max") or value[2].isnan(), name
        assert ours["token"][2] == 0
        targets = torch.tensor([1, 2, -100, 3])
        ours = draw(executor, logits, targets=targets, skip_ignored=True, **options)
        assert all(value[2] == 0 for value in ours.values())


@pytest.mark.parametrize("vocabulary", [5, 7, 8])
def test_nothing_is_read_outside_of_the_logits(executor, vocabulary):
    """The last row ends with its memory, where the sanitizers watch, and no target is inside."""
    logits = torch.linspace(0, 1, 8 + vocabulary).as_strided((2, vocabulary), (8, 1))
    targets = torch.tensor([-1, vocabulary])
    bias = torch.zeros(vocabulary)
    for options in ({}, {"rng": keyed(2), "top_p": 0.5}):
        ours = draw_there(executor, logits, targets=targets, bias=bias, forbid_ids=[3], **options)
        assert ours["logprob"].isnan().all()
        truth = truth_of(logits, forbid_ids=[3])
        same_numbers(ours, truth, ("lse", "entropy", "margin"))


def test_a_row_does_not_depend_on_the_batch(executor):
    logits = random_logits(20, 97)
    for options in ({}, {"top_k": 12, "top_p": 0.8}):
        whole = draw(executor, logits, rng=keyed(20), **options)
        for part in ([0], [19, 3], list(range(19, 9, -1))):
            alone = draw(executor, logits[part], rng=keyed(20).take(part), **options)
            for name, value in alone.items():
                assert torch.equal(value, whole[name][part]), name


@pytest.mark.parametrize("options", [{"top_k": 6}, {"top_k": 9, "top_p": 0.8}], ids=str)
def test_draws_follow_the_distribution(executor, options):
    """300 draws over 16 tokens; five standard deviations of chi-square."""
    logits = 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    order = logits.argsort(descending=True)
    tempered = (logits / 1.5).double()[order]
    tempered[options["top_k"] :] = -math.inf
    share = tempered.softmax(0)
    tempered[share.cumsum(0) - share >= options.get("top_p", 1.1)] = -math.inf
    expected = torch.zeros(16, dtype=torch.float64).scatter(0, order, 300 * tempered.softmax(0))
    drawn = draw(executor, logits.expand(300, 16), rng=keyed(300), draw_temperature=1.5, **options)
    counts = torch.bincount(drawn["token"], minlength=16).double()
    used = expected > 0
    assert (counts[~used] == 0).all()
    statistic = float(((counts - expected) ** 2 / expected)[used].sum())
    freedom = int(used.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_what_cannot_be_planned():
    logits = torch.zeros(3, 20)
    plan = extension().plan_row_draw
    rows = Rows(3, 20, rng=keyed(3))
    for address, stride, top_k, top_p, reason in (
        (logits.data_ptr() + 4, 20, 0, 1.0, "multiple of 16 bytes"),
        (logits.data_ptr(), 18, 0, 1.0, "row_stride"),
        (logits.data_ptr(), 22, 0, 1.0, "row_stride"),
        (logits.data_ptr(), 20, -1, 1.0, "top_k"),
        (logits.data_ptr(), 20, 0, 0.0, "top_p"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan(rows.bound, (address, stride), top_k, top_p)
