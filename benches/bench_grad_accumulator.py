"""GradAccumulator against plain torch: one sample's gradients into float32 main gradients.

Run: python -m pytest benches/bench_grad_accumulator.py --benchmark-enable
Groups: the plain sum; the sum with norm and inner product; norms of a linear layer's samples from
its rows. Sizes: the layers of a block of Qwen3-0.6B, and a model of as many small tensors.
"""

from __future__ import annotations

import pytest
import torch

from dlm_fast.ops import GradAccumulator, sample_grad_norm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {
    "qwen3-block": [
        *((2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048)),
        *((3072, 1024), (3072, 1024), (1024, 3072)),
    ],
    "small-tensors": [(96, 96)] * 64,
}


def gradients(size: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SIZES[size]]


def describe(benchmark, numbers: int, dtype: torch.dtype) -> None:
    """Bytes that must move: main gradients read and written, gradients read."""
    benchmark.extra_info["bytes"] = numbers * (8 + dtype.itemsize)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__


@pytest.mark.parametrize("provider", ["torch", "dlm_fast"])
@pytest.mark.parametrize("statistics", [False, True], ids=["sum", "statistics"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_add(benchmark, size, dtype, statistics, provider):
    grads = gradients(size, DTYPES[dtype])
    params = [torch.zeros_like(grad).requires_grad_() for grad in grads]
    accumulator = GradAccumulator(params, statistics=statistics)
    what = "sum, norm, inner product" if statistics else "sum"
    benchmark.group = f"GradAccumulator {what} {size} {dtype}"
    describe(benchmark, sum(grad.numel() for grad in grads), DTYPES[dtype])
    mains = [torch.zeros(grad.shape) for grad in grads]

    def ours():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        accumulator.add()

    def plain():
        square = inner = 0.0
        for main, grad in zip(mains, grads, strict=True):
            if statistics:
                wide = grad.float()
                square += wide.square().sum()
                inner += (wide * main).sum()
            main.add_(grad)
        return square, inner

    benchmark(ours if provider == "dlm_fast" else plain)
    kept = accumulator.main_grads if provider == "dlm_fast" else mains
    assert all(bool(main.any()) for main in kept)


@pytest.mark.parametrize("provider", ["torch", "dlm_fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_norms(benchmark, dtype, provider):
    """Eight samples of 128 rows of one layer, 1024 to 3072."""
    generator = torch.Generator().manual_seed(0)
    grad_output, inputs = (
        torch.randn(8, 128, width, generator=generator).to(DTYPES[dtype]) for width in (3072, 1024)
    )
    rows = grad_output.flatten(0, 1), inputs.flatten(0, 1)
    benchmark.group = f"sample_grad_norm 8 x 128 rows, 1024 to 3072, {dtype}"

    def ours():
        return sample_grad_norm(*rows, range(0, 1025, 128))

    def plain():
        return torch.stack(
            [(g.T @ x).float().square().sum() for g, x in zip(grad_output, inputs, strict=True)]
        )

    assert bool((benchmark(ours if provider == "dlm_fast" else plain) > 0).all())
