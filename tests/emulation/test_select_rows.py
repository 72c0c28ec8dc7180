"""Gathering rows and adding their gradients back, against indexing."""

from __future__ import annotations

import pytest
import torch

from dlm_fast.ops._common import addresses, extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gather(executor, source_TD, rows, targets, valid, count, first=0):
    """[count, D], filled with a number that must be gone afterwards."""
    out_ND = torch.full((count, source_TD.shape[1]), 77.0, dtype=source_TD.dtype)
    plan = extension().plan_gather_rows(
        (count, valid, *source_TD.shape),
        (source_TD.data_ptr(), source_TD.stride(0)),
        *addresses(rows),
        first,
        *addresses(targets, out_ND),
        DTYPES.index(source_TD.dtype),
    )
    executor.launch(plan, out_ND.device)
    return out_ND


@pytest.mark.covers("gather_rows_16", "gather_rows_32", "gather_rows_64")
@pytest.mark.parametrize("width", [1, 255, 256, 300])
def test_gather(executor, width):
    generator = torch.Generator().manual_seed(width)
    for dtype in DTYPES:
        wide_TD = torch.randn(6, width + 3, generator=generator).to(dtype)
        source_TD = wide_TD[:, 1 : width + 1]
        rows = torch.tensor([5, 0, 0, 3, 6, -1], dtype=torch.int32)
        targets = torch.tensor([1, 0, -100, 9, 2, 2])
        out = gather(executor, source_TD, rows, targets, 6, 8)
        assert torch.equal(out[[0, 1, 3]], source_TD[[5, 0, 3]])
        assert (out[[2, 6, 7]] == 0).all()  # ignored, and behind the valid ones
        assert out[[4, 5]].isnan().all()  # outside the source
        plain = gather(executor, source_TD, None, None, 3, 4, first=2)
        assert torch.equal(plain[:3], source_TD[2:5]) and (plain[3] == 0).all()


@pytest.mark.covers(
    *(f"scatter_rows_{name}" for name in ("f32_f32", "f32_bf16", "f32_f16", "f64_f64"))
)
@pytest.mark.parametrize("width", [1, 255, 256, 300])
def test_scatter(executor, width):
    generator = torch.Generator().manual_seed(width)
    rows = torch.tensor([4, 1, 4, 4, 0], dtype=torch.int32)
    order = rows.sort(stable=True).indices
    start = torch.searchsorted(rows[order], torch.arange(6, dtype=torch.int32) + 0)
    start = torch.cat([start, torch.tensor([5])])
    for dtype in DTYPES:
        real = torch.float64 if dtype == torch.float64 else torch.float32
        grad_ND = torch.randn(5, width, generator=generator).to(real)
        out_TD = torch.full((6, width), torch.nan, dtype=dtype)
        plan = extension().plan_scatter_rows(
            6, width, *addresses(grad_ND, order, start, out_TD), DTYPES.index(dtype)
        )
        executor.launch(plan, out_TD.device)
        sums = torch.zeros(6, width, dtype=real)
        for row, grad in zip(rows.tolist(), grad_ND, strict=True):
            sums[row] += grad  # in the order of the selection
        assert torch.equal(out_TD, sums.to(dtype))
