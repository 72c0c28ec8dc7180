"""token_logprob against plain torch: log-probabilities of selected rows, then their gradient.

Run: python -m pytest benches/bench_token_logprob.py --benchmark-enable
Every provider delivers log-probabilities [N]; the step also float gradients of hidden and head.
"""

from __future__ import annotations

import pytest
import torch
from head_baselines import BASELINES, SIZES, describe

from dlm_fast.benchmark.problem import make_head
from dlm_fast.ops import token_logprob

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def ours(head):
    return token_logprob(head.hidden, head.weight, head.targets, rows=head.rows).logprob


PROVIDERS = BASELINES | {"dlm_fast": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_forward(benchmark, size, dtype, provider):
    head = make_head(SIZES[size], DTYPES[dtype])
    benchmark.group = f"token_logprob forward {size} {dtype}"
    describe(benchmark, SIZES[size], DTYPES[dtype], 2)
    with torch.no_grad():
        logprob = benchmark(PROVIDERS[provider], head)
    assert logprob.shape == (SIZES[size].n,)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(benchmark, size, dtype, provider):
    head = make_head(SIZES[size], DTYPES[dtype])
    benchmark.group = f"token_logprob step {size} {dtype}"
    describe(benchmark, SIZES[size], DTYPES[dtype], 6)

    def step():
        head.clear()
        (PROVIDERS[provider](head) * head.row_weight).sum().backward()

    benchmark(step)
    assert head.weight.grad is not None
