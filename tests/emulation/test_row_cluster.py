"""The row kernels of clusters against the ones of single blocks, and their slices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension

NAMES = ("logprob", "lse", "entropy", "row_max", "log_sum", "confidence", "margin", "argmax")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def view(logits_NV: Tensor, targets: Tensor, bias: Tensor) -> tuple[object, dict[str, Tensor]]:
    outputs = {name: torch.full((len(logits_NV),), torch.nan) for name in NAMES}
    outputs["argmax"] = torch.full((len(logits_NV),), -7)
    rows = extension().LogitRows(
        tuple(logits_NV.shape),
        (logits_NV.data_ptr(), logits_NV.stride(0)),
        0,
        bias.data_ptr(),
        0.8,
        targets.data_ptr(),
        addresses(*outputs.values()),
    )
    return rows, outputs


def logits_with_ties(vocabulary: int) -> Tensor:
    """Rows a multiple of 4 apart, NaN behind their ends, maxima twice in different slices."""
    stride = (vocabulary + 3) // 4 * 4
    buffer = torch.full((4, stride), torch.nan)
    logits = buffer[:, :vocabulary]
    logits.copy_(3 * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(1)))
    logits[1, 0] = logits[1, -1] = 30.0
    logits[2, vocabulary // 2] = logits[2, -1] = 30.0
    logits[3] = -torch.inf
    logits[3, -1] = 2.0
    return logits


# One column a block at most; blocks with nothing; a ragged last slice; several rounds a thread.
VOCABULARIES = [1, 7, 29, 33, 1031, 8192, 8225]


@pytest.mark.covers("row_stats_cluster_f32", "row_stats_top_cluster_f32")
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_statistics(executor, vocabulary):
    logits = logits_with_ties(vocabulary)
    targets = torch.tensor([vocabulary - 1, 0, vocabulary // 3, -100])
    bias = torch.linspace(-1, 1, vocabulary)
    bias[[0, vocabulary // 2, -1]] = 0.5
    z = (logits.double() + bias.double()) / 0.8
    logprob = z.log_softmax(-1)
    for top in (False, True):
        rows, got = view(logits, targets, bias)
        executor.launch(extension().plan_row_stats(rows, top, True), logits.device)
        want = logprob.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        truth = {"logprob": want, "lse": z.logsumexp(-1), "row_max": z.amax(-1)}
        truth["entropy"] = -(logprob.exp() * logprob.clamp(min=-1e9)).sum(-1)
        truth["log_sum"] = truth["lse"] - truth["row_max"]
        for name, exact in truth.items():
            exact[3] = 0  # ignored
            torch.testing.assert_close(got[name].double(), exact, atol=2e-5, rtol=2e-6)
        if top:
            assert torch.equal(got["argmax"], z.argmax(-1))
            best = torch.cat([logprob, torch.full((4, 1), -torch.inf)], 1).exp().topk(2, -1).values
            torch.testing.assert_close(got["confidence"].double(), best[:, 0], atol=1e-5, rtol=0)
            margin = (best[:, 0] - best[:, 1]).double()
            torch.testing.assert_close(got["margin"].double(), margin, atol=1e-5, rtol=0)


@pytest.mark.covers(*(f"row_step_cluster_f32_{name}" for name in ("f32", "bf16", "f16")))
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_gradient(executor, vocabulary):
    weights = torch.tensor([0.5, -2.0, 0.0, 3.0])
    targets = torch.tensor([vocabulary - 1, 0, vocabulary // 3, -100])
    bias = torch.linspace(-1, 1, vocabulary)
    for dtype in DTYPES:
        logits = logits_with_ties(vocabulary)
        z = ((logits.double() + bias.double()) / 0.8).requires_grad_()
        chosen = z.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:3, 0]
        (chosen * weights[:3].double()).sum().backward()
        exact = z.grad / 0.8
        statistics = {"logprob": chosen.detach(), "lse": z.detach()[:3].logsumexp(-1)}
        rows, got = view(logits, targets, bias)
        stride = logits.stride(0)
        grad = torch.full((4, stride), torch.nan, dtype=dtype)[:, :vocabulary]
        grad = logits if dtype == torch.float32 else grad  # in place
        hidden = torch.full((4, 5), torch.nan, dtype=dtype)
        bound = extension().LogitRowsGrad(
            rows,
            (weights.data_ptr(), 0, 0),
            (grad.data_ptr(), stride, DTYPES.index(dtype)),
            (hidden.data_ptr(), 5),
        )
        executor.launch(extension().plan_row_step(bound, True), logits.device)
        tolerance = (
            {"atol": 3e-6, "rtol": 0}
            if dtype == torch.float32
            else {
                "atol": 1e-6,
                "rtol": 2**-8 if dtype == torch.bfloat16 else 2**-10,
            }
        )
        torch.testing.assert_close(grad.double(), exact, **tolerance)
        assert (grad[2:] == 0).all() and (hidden[2:] == 0).all()
        for name, values in statistics.items():
            torch.testing.assert_close(got[name][:3].double(), values, atol=2e-5, rtol=2e-6)
        assert hidden[:2].isnan().all()  # rows that take part are left alone
