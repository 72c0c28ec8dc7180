"""Rows with several targets share their sweep over the vocabulary."""

import pytest
import torch

import dlm_fast
from dlm_fast.models.requests import ScoreRequest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forbid_ids", [(), (5, 90)])
def test_they_equal_repeated_rows(dtype, forbid_ids):
    policy = dlm_fast.load("tiny", width=16, layers=1, heads=2).to(dtype)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 90, (2, 7), generator=generator)
    rows = torch.tensor([3, 4, 8, 12], dtype=torch.int32)
    targets = torch.randint(6, 90, (4, 5), generator=generator)
    targets[1, 2], targets[2] = -100, -100
    weight = torch.randn(4, 5, generator=generator)
    options = {"temperature": 0.7, "forbid_ids": forbid_ids}
    found = []
    for several in (True, False):
        request = (
            ScoreRequest(rows, targets, **options)
            if several
            else ScoreRequest(rows.repeat_interleave(5), targets.flatten(), **options)
        )
        output = policy(input_ids, score=request)
        logprob, entropy = output.logprob.view(4, 5), output.entropy.view(4, -1)[:, 0]
        policy.zero_grad()
        (weight * logprob).sum().backward()
        grads = [p.grad.clone().float() for p in policy.parameters() if p.grad is not None]
        found.append((logprob.detach(), entropy.detach(), grads))
    (ours, entropy, grads), (theirs, other, expected) = found
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-5}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy[:2], other[:2], rtol=0, atol=tolerance)
    assert (ours[2] == 0).all() and ours[1, 2] == 0
    scale = 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 5e-2
    for one, two in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=scale, atol=scale * float(two.abs().max()))


def test_bad_requests():
    policy = dlm_fast.load("tiny", width=16, layers=1, heads=2)
    ids, rows = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    targets = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="weigh logprob"):
        policy(ids, score=ScoreRequest(rows, targets, weights=torch.ones(1, 2)))
    with pytest.raises(ValueError, match=r"targets\[0, 1\] = 4 is one of forbid_ids"):
        policy(ids, score=ScoreRequest(rows, targets, forbid_ids=[4]))
    with pytest.raises(ValueError, match="at least one"):
        policy(ids, score=ScoreRequest(rows, targets[:, :0]))
