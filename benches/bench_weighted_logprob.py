"""weighted_logprob against plain torch: a Monte-Carlo micro-step that ends in a float32 gradient.

Run: python -m pytest benches/bench_weighted_logprob.py --benchmark-enable
Groups: the functional step (fresh gradients), and the accumulating step (float32 main gradient of
the head, as over Monte-Carlo samples).
"""

from __future__ import annotations

import pytest
import torch
from head_baselines import BASELINES, SIZES, describe

from dlm_fast.benchmark.problem import make_head
from dlm_fast.benchmark.providers import OURS, by_autograd, ours

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROVIDERS = [*BASELINES, OURS]


def work_of(provider: str, work: str):
    return getattr(ours(), work) if provider == OURS else by_autograd(BASELINES[provider])[work]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_functional_step(benchmark, size, dtype, provider):
    head = make_head(SIZES[size], DTYPES[dtype])
    benchmark.group = f"weighted_logprob step {size} {dtype}"
    describe(benchmark, SIZES[size], DTYPES[dtype], 6)
    benchmark(work_of(provider, "gradients"), head)
    assert head.hidden.grad is not None


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_accumulating_step(benchmark, size, dtype, provider):
    head = make_head(SIZES[size], DTYPES[dtype])
    main_grad = torch.zeros(head.weight.shape)
    benchmark.group = f"weighted_logprob_ accumulating step {size} {dtype}"
    describe(benchmark, SIZES[size], DTYPES[dtype], 6)
    benchmark(work_of(provider, "weighted_step"), head, main_grad)
    assert bool(main_grad.any())
