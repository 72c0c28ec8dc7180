"""The unmasking rules on a CUDA device: equal to the CPU backend and to the twin."""

from __future__ import annotations

import pytest
import torch
from device_runs import on_device
from hypothesis import given, settings
from unmask_problems import (
    check_equal,
    check_numbers_out_of_range,
    check_rule,
    options_of_rule,
    problems,
    rows_of_all_kinds,
)

from dlm_fast.ops import unmask_select
from dlm_fast.ops.unmask_select import RULES

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 7, 31, 33, 257, 1000, 2049, 4096, 4097, 5000])
@pytest.mark.parametrize("rule", RULES)
def test_rows(run, rule, length, dtype):
    check_rule(run, rule, length, dtype)


def test_numbers_out_of_range(run):
    check_numbers_out_of_range(run, 40)


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_equals_the_definition(device, problem):
    check_equal(on_device(device), *problem)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_waits_for_the_device(device, rule):
    score, selectable, uncertainty, prefix = rows_of_all_kinds(300, torch.float32)
    options = options_of_rule(rule, score, uncertainty, prefix)
    options = {name: value.to(device) for name, value in options.items()}
    score, selectable = score.to(device), selectable.to(device)
    unmask_select(score, selectable, rule, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        unmask_select(score, selectable, rule, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
