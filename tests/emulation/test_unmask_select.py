"""The kernel of the unmasking rules, emulated: equal to the CPU backend and to the twin."""

from __future__ import annotations

import pytest
import torch
from device_runs import on_emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from unmask_problems import check_equal, check_numbers_out_of_range, check_rule, problems

from dlm_fast import _C
from dlm_fast.ops._executor import Emulated
from dlm_fast.ops.unmask_select import RULES


@pytest.mark.covers("unmask_select_f32")
@pytest.mark.parametrize("length", [1, 7, 31, 33, 257])
@pytest.mark.parametrize("rule", RULES)
def test_float_rows(run, rule, length):
    check_rule(run, rule, length)


@pytest.mark.covers("unmask_select_f64")
@pytest.mark.parametrize("length", [1, 33, 257])
@pytest.mark.parametrize("rule", RULES)
def test_double_rows(run, rule, length):
    check_rule(run, rule, length, torch.float64)


@pytest.mark.covers("unmask_select_f32")
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_several_chunks(rule):
    check_rule(on_emulator("reverse"), rule, 1000)


@pytest.mark.covers("unmask_select_f32", "unmask_select_f64")
@pytest.mark.parametrize("rule", ["top_k", "factor", "eb", "random"])
def test_rows_with_more_candidates_than_shared_memory_holds(rule):
    # one more in the row that is all open, which also makes the last tile hold one position
    for length, dtype in [(4097, torch.float32), (2049, torch.float64)]:
        assert _C.unmask_select_capacity(length, dtype == torch.float64) == length - 1
        check_rule(on_emulator("random"), rule, length, dtype)


@pytest.mark.covers("unmask_select_f32")
def test_numbers_out_of_range(run):
    check_numbers_out_of_range(run, 40)


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(Emulated.ORDERS), st.integers(0, 2**16))
def test_equals_the_definition(problem, order, seed):
    check_equal(on_emulator(order, seed), *problem)


def test_plans():
    none, some = (0,) * 8, (8,) * 8
    assert _C.plan_unmask_select(3, 40, 0, 0, False, some, (0, 8))[:5] == (
        *("unmask_select_f32", (3, 1), 64, 1),
        64 * 8 + 16,
    )
    assert _C.plan_unmask_select(3, 9000, 0, 0, True, some, (8, 8))[:5] == (
        *("unmask_select_f64", (3, 1), 256, 1),
        2048 * 16 + 16,
    )
    for wrong, match in [
        ((0, 4, 0, 0, False, none, (0, 0)), "no positions"),
        ((4, 0, 0, 0, False, none, (0, 0)), "no positions"),
        ((1, 4097, 0, 0, False, none, (0, 0)), "need order"),
        ((1, 2049, 0, 0, True, none, (0, 0)), "need order"),
        ((1, 4, 8, 0, False, none, (0, 0)), "no such rule"),
        ((1, 4, 0, 2**32, False, none, (0, 0)), "draw must fit"),
        ((2**31, 4, 0, 0, False, none, (0, 0)), "rows must stay"),
        ((1, 2**31, 0, 0, False, none, (0, 0)), "reach 2\\^31"),
    ]:
        with pytest.raises(ValueError, match=match):
            _C.plan_unmask_select(*wrong)
