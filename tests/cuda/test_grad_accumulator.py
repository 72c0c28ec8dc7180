"""The pass that adds one sample's gradients on a CUDA device: equal to the definition."""

from __future__ import annotations

import pytest
import torch
from axpy_problems import PAIRS, SIZES, check, tensors

from dlm_fast.ops import GradAccumulator, axpy_multi

pytestmark = pytest.mark.cuda


def in_place_on(device):
    """``run`` for an op that changes its first argument."""

    def run(op, mains, grads, *args, **options):
        moved = [main.to(device) for main in mains]
        result = op(moved, [grad.to(device) for grad in grads], *args, **options)
        for main, after in zip(mains, moved, strict=True):
            main.copy_(after)
        return result.cpu()

    return run


@pytest.mark.parametrize(("main_dtype", "grad_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("max_norm", [100.0, float("inf")])
def test_equals_the_definition(device, main_dtype, grad_dtype, max_norm):
    mains, grads = tensors((*SIZES, 1_000_003), main_dtype, grad_dtype)
    options = {"max_norm": max_norm, "keys": range(7, 8 + len(SIZES)), "step": 3}
    check(in_place_on(device), mains, grads, -0.7, **options)


def test_more_tensors_than_a_launch_takes(device):
    mains, grads = tensors([37] * 200, torch.float32, torch.bfloat16)
    check(in_place_on(device), mains, grads, 2.0, max_norm=1.0, square_elsewhere=5.0)


def test_repeats_bit_for_bit(device):
    runs = []
    for _ in range(2):
        mains, grads = tensors((1_000_003,), torch.bfloat16, torch.float16)
        runs.append([in_place_on(device)(axpy_multi, mains, grads, keys=[4]), *mains])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_accumulator(device):
    param = torch.zeros(1000, device=device, requires_grad=True)
    accumulator = GradAccumulator([param])
    stack = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    for row in stack:
        param.grad = row.to(device)
        accumulator.add()
    found = accumulator.statistics()
    assert torch.allclose(accumulator.main_grads[0].cpu(), stack.sum(0), atol=1e-5)
    assert found.variance == pytest.approx(float(stack.double().var(0).sum()), rel=1e-5)
