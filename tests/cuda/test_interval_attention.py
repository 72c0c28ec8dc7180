"""interval_attention on a CUDA device equals its definition, forward and backward."""

import pytest
import torch
from attention_problems import exact, free_intervals, random_qkv, values_and_gradients
from head_problems import relative_error

from dlm_fast.ops import Visibility, interval_attention, interval_attention_ref

pytestmark = pytest.mark.cuda

PATTERNS = {
    "ragged": Visibility.full([200, 1, 130]).intervals,
    "causal": Visibility.causal([300]).intervals,
    "block causal": Visibility.block_causal([129, 256], 4).intervals,
    "random": free_intervals(300, 460, 5),
    "few queries": free_intervals(32, 700, 6),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_definition(device, pattern, heads, dtype, tolerance):
    intervals = PATTERNS[pattern]
    cpu = random_qkv(int(intervals.max()), len(intervals), *heads, 64, dtype=dtype)
    on_device = [x.detach().to(device).requires_grad_() for x in cpu]
    there = intervals.to(device)
    found = values_and_gradients(lambda *t: interval_attention(*t, there), on_device)
    truth = values_and_gradients(lambda *t: interval_attention_ref(*t, intervals), exact(cpu))
    for ours, expected in zip(found, truth, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.detach().cpu(), expected) < tolerance


def test_rows_that_see_nothing_give_zeros(device):
    intervals = torch.tensor([[0, 3, 5, 6]] * 200, dtype=torch.int32, device=device)
    tensors = [
        x.detach().to(device).requires_grad_()
        for x in random_qkv(7, 200, width=32, dtype=torch.float32)
    ]
    out, gradient, *_ = values_and_gradients(lambda *t: interval_attention(*t, intervals), tensors)
    for result in (out, gradient):
        assert not bool(result[[3, 4, 6]].any()) and bool(result.isfinite().all())
