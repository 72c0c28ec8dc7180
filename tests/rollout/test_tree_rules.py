"""Tests of what ends a path: boxes, repetitions, the order of the rules."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.rollout.tree_rules import (
    Reason,
    SegmentEnd,
    classify,
    has_closed_box,
    has_repetition,
)


def text_of(ids: Any) -> str:
    return "".join(map(chr, ids))


def end(response: str, segment: int = 1000, **changes: Any) -> SegmentEnd:
    ids = [ord(c) for c in response]
    facts = {"depth": 1, "is_stopped": False, "max_tokens": 10**6, **changes}
    return SegmentEnd(segment_ids=ids[-segment:], response_ids=ids, **facts)


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        (r"\boxed{4}", True),
        (r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{a{b{c}}}", True),
        (r"\boxed{a{b{c{d}}}}", True),
        (r"\boxed{a{b{c{d{e}}}}}", False),
        (r"\boxed{4", False),
        (r"\boxed{\boxed{4}", True),
        (r"{\boxed}", False),
        ("", False),
    ],
)
def test_boxes(text: str, closed: bool) -> None:
    assert has_closed_box(text) is closed


def test_thirty_nine_equal_characters_repeat_and_thirty_eight_do_not() -> None:
    for length, repeats in ((38, None), (39, Reason.REPETITION)):
        assert classify(end("x" * length), TreeConfig(), text_of) is repeats


def test_twenty_three_equal_tokens_repeat_and_twenty_two_do_not() -> None:
    config = TreeConfig(repetition="token")
    for length, repeats in ((22, None), (23, Reason.REPETITION)):
        assert classify(end("x" * length), config, text_of) is repeats
    assert classify(end("x" * 500), TreeConfig(repetition="none"), text_of) is None


def test_only_the_new_segment_is_searched_for_repetitions() -> None:
    assert classify(end("x" * 60 + "abcdefgh", segment=8), TreeConfig(), text_of) is None


@given(st.lists(st.integers(0, 2), max_size=80), st.integers(1, 5), st.integers(1, 5))
def test_repetitions_are_counted_like_slices(items: list[int], window: int, times: int) -> None:
    runs = Counter(tuple(items[i : i + window]) for i in range(len(items) - window + 1))
    assert has_repetition(items, window, times) == (max(runs.values(), default=0) >= times)


def test_windows_with_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "cumsum", lambda x: np.zeros_like(x))  # every hash is 0
    assert not has_repetition(list(range(100)), 8, 2)
    assert has_repetition([*range(20), *range(20)], 8, 2)


@pytest.mark.parametrize(
    ("answer", "text", "stopped", "reason"),
    [
        ("boxed_and_eos", r"so \boxed{4}", True, Reason.ANSWER),
        ("boxed_and_eos", r"so \boxed{4}", False, None),
        ("boxed_as_eos", r"so \boxed{4} and", False, Reason.ANSWER),
        ("boxed_and_eos", r"so \boxed{4", True, Reason.UNCLOSED),
        ("boxed_as_eos", r"so \boxed{4", False, None),
        ("boxed_and_eos", "so 4", True, Reason.EOS),
        ("none", r"so \boxed{4}", True, Reason.EOS),
        ("none", r"so \boxed{4}", False, None),
    ],
)
def test_answers(answer: Any, text: str, stopped: bool, reason: Reason | None) -> None:
    found = classify(end(text, is_stopped=stopped), TreeConfig(answer=answer), text_of)
    assert found is reason


def test_a_box_across_the_edge_of_a_segment_is_seen() -> None:
    across = end(r"so \boxed{4} is it", segment=6, is_stopped=True)
    assert classify(across, TreeConfig(), text_of) is Reason.ANSWER
    assert classify(across, TreeConfig(compat=True), text_of) is Reason.EOS


def test_answers_are_looked_for_in_the_last_256_tokens() -> None:
    words = " ".join(str(i) for i in range(200))
    for distance, reason in ((246, Reason.ANSWER), (248, Reason.EOS)):
        far = end(r"\boxed{4}" + words[:distance], segment=8, is_stopped=True)
        assert classify(far, TreeConfig(), text_of) is reason
    whole = end(r"\boxed{4}" + words[:300], segment=400, is_stopped=True)
    assert classify(whole, TreeConfig(), text_of) is Reason.ANSWER


def test_limits_and_their_order() -> None:
    config = TreeConfig(max_depth=3)
    assert classify(end("abc", depth=3), config, text_of) is Reason.MAX_DEPTH
    assert classify(end("abc", depth=3, max_tokens=3), config, text_of) is Reason.MAX_TOKENS
    at_end = end("abc", depth=3, max_tokens=3, is_stopped=True)
    assert classify(at_end, config, text_of) is Reason.EOS
    loop = end("x" * 50, depth=3, is_stopped=True)
    assert classify(loop, config, text_of) is Reason.REPETITION
    last = TreeConfig(max_depth=3, repetition_first=False)
    assert classify(loop, last, text_of) is Reason.EOS
    assert classify(end("x" * 50), last, text_of) is Reason.REPETITION


def test_better_ends_have_larger_numbers() -> None:
    numbers = {"ANSWER": 7, "UNCLOSED": 6, "EOS": 5, "MAX_DEPTH": 4, "MAX_TOKENS": 3}
    numbers |= {"REPETITION": 2, "UNFINISHED": 1}
    assert {reason.name: reason.value for reason in Reason} == numbers
