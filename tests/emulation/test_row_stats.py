"""The row kernels against their definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OUTPUTS = ("logprob", "lse", "entropy", "row_max", "log_sum", "confidence", "margin", "argmax")


def make_rows(logits_NV: Tensor, targets_N: Tensor | None, temperature: float, bias_V=None):
    """The extension's view of rows, and its outputs, filled with NaN."""
    rows, vocabulary = logits_NV.shape
    outputs = {name: torch.full((rows,), torch.nan, dtype=logits_NV.dtype) for name in OUTPUTS}
    outputs["argmax"] = torch.full((rows,), -7, dtype=torch.int64)
    bound = extension().LogitRows(
        (rows, vocabulary),
        (logits_NV.data_ptr(), logits_NV.stride(0)),
        DTYPES.index(logits_NV.dtype),
        *addresses(bias_V),
        temperature,
        *addresses(targets_N),
        addresses(*outputs.values()),
    )
    return bound, outputs


def padded(logits_NV: Tensor) -> Tensor:
    """The same rows, a multiple of four elements apart, with NaN between them."""
    rows, vocabulary = logits_NV.shape
    buffer = torch.full((rows, (vocabulary + 3) // 4 * 4), torch.nan, dtype=logits_NV.dtype)
    buffer[:, :vocabulary] = logits_NV
    return buffer[:, :vocabulary]


@pytest.mark.covers("row_stats_top_f32")
@pytest.mark.parametrize("vocabulary", [1, 5, 97, 1024, 2051])
def test_statistics_equal_the_definition(executor, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = padded(torch.randn(3, vocabulary, generator=generator) * 4)
    targets = torch.tensor([vocabulary - 1, -100, 0])
    bound, outputs = make_rows(logits, targets, 0.7)
    executor.launch(extension().plan_row_stats(bound, True, False), logits.device)
    z = logits.double() / 0.7
    logprob = z.log_softmax(-1)
    want = logprob.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    want[1] = 0
    torch.testing.assert_close(outputs["logprob"].double(), want, atol=3e-6, rtol=0)
    entropy = -(logprob.exp() * logprob).sum(-1)
    entropy[1] = 0
    torch.testing.assert_close(outputs["entropy"].double(), entropy, atol=5e-6, rtol=0)
    assert torch.equal(outputs["argmax"], z.argmax(-1))
