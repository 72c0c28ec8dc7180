"""Hints from a reference trace: chunks, counts and places, against the published numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.algorithms.hints import (
    HintRules,
    choose,
    chunks,
    hint,
    num_chosen,
    placed,
    without_answer,
)

RULES = HintRules(
    window=256,
    tail=30,
    chunk_min=5,
    chunk_max=10,
    placement="stretch",
    count_round="floor",
    reveal_last_chunk=False,
)


def drawing(*sizes, low=5, high=10):
    """Uniform numbers that make chunks of these sizes."""
    numbers = iter([(size - low + 0.5) / (high - low + 1) for size in sizes])
    return lambda: next(numbers)


def test_chunks():
    made = chunks(37, 5, 10, drawing(5, 10, 7, 6, 8, 9))
    assert made == [(0, 5), (5, 15), (15, 22), (22, 28), (28, 36)]
    assert chunks(4, 5, 10, drawing(5)) == [] and chunks(0, 5, 10, drawing()) == []
    assert chunks(5, 5, 10, drawing(9)) == [(0, 5)]


@pytest.mark.parametrize(
    ("eta", "floor", "ceil"), [(0.2, 1, 1), (0.35, 1, 2), (0.4, 2, 2), (0.6, 3, 3), (0.8, 4, 4)]
)
def test_counts(eta, floor, ceil):
    assert num_chosen(5, eta, "floor") == floor and num_chosen(5, eta, "ceil") == ceil


@pytest.mark.parametrize(
    ("length", "chosen", "expected"),
    [
        (37, [(5, 15), (28, 36)], [(7, 17), (36, 44)]),
        (180, [(10, 20), (150, 160)], [(12, 22), (122, 132)]),
        (226, [(10, 20), (220, 226)], [(10, 20), (120, 126)]),
        (164, [(82, 92)], [(112, 122)]),  # 113 in exact arithmetic
    ],
)
def test_stretched_places(length, chosen, expected):
    assert placed(chosen, length, RULES) == expected
    assert placed(chosen, length, replace(RULES, placement="inplace")) == [
        (b, min(e, 226)) for b, e in chosen
    ]


def test_what_does_not_fit_is_cut_or_dropped():
    rules = replace(RULES, window=40)  # room for 10
    assert placed([(0, 5), (6, 14), (15, 20)], 20, rules) == [(0, 5), (6, 10)]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(0, 300),
    eta=st.floats(0, 1),
    low=st.integers(1, 6),
    more=st.integers(0, 6),
    window=st.integers(31, 300),
    placement=st.sampled_from(["stretch", "inplace"]),
    count_round=st.sampled_from(["floor", "ceil"]),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_hints_lie_in_order_in_their_room(
    length, eta, low, more, window, placement, count_round, last, seed
):
    rules = HintRules(
        window=window,
        tail=30,
        chunk_min=low,
        chunk_max=low + more,
        placement=placement,
        count_round=count_round,
        reveal_last_chunk=last,
    )
    trace = torch.arange(1000, 1000 + length)

    def made():
        generator = torch.Generator().manual_seed(seed)
        return hint(trace, eta, rules, 7, lambda: float(torch.rand((), generator=generator)))

    one, again = made(), made()
    assert torch.equal(one.fixed_ids, again.fixed_ids) and torch.equal(one.mask, again.mask)
    assert one.num_tokens == int((one.fixed_ids != 7).sum())
    assert not one.mask[window - 30 :].any()
    given_tokens = one.fixed_ids[one.mask]
    assert torch.equal(given_tokens, given_tokens.sort().values)  # in the trace's order
    assert given_tokens.unique().numel() == given_tokens.numel()
    if eta == 0:
        assert not one.mask.any()
    if placement == "inplace":
        assert torch.equal(given_tokens - 1000, one.mask.nonzero()[:, 0])


def test_all_chunks_in_place_are_the_trace():
    rules = replace(RULES, placement="inplace", chunk_min=1, chunk_max=3)
    trace = torch.arange(1000, 1100)
    generator = torch.Generator().manual_seed(0)
    made = hint(trace, 1.0, rules, 7, lambda: float(torch.rand((), generator=generator)))
    assert torch.equal(made.fixed_ids[:100], trace) and made.num_tokens == 100


def test_the_last_chunk_on_demand():
    cut = [(0, 5), (5, 10), (10, 15)]
    draws = iter([0.1, 0.2, 0.3])
    rules = replace(RULES, reveal_last_chunk=True)
    assert choose(cut, 0.4, rules, lambda: next(draws)) == [(0, 5), (10, 15)]


@pytest.mark.parametrize("mark", ["The answer is 4", "#### 4", "\\boxed{4}", "<answer>4</answer>"])
def test_the_answer_is_cut(mark):
    assert without_answer(f"2 + 2 = 4. {mark}") == ("2 + 2 = 4. ", True)
    assert without_answer("2 + 2 = 4.") == ("2 + 2 = 4.", False)
