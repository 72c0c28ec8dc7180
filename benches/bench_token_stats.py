"""token_stats against plain torch: one denoising step's tokens, confidences, margins, entropies.

Run: python -m pytest benches/bench_token_stats.py --benchmark-enable
Baselines compute the same five numbers from dense logits, of the selected rows or of all rows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from head_baselines import SIZES, describe

from dlm_fast.benchmark.problem import Head, make_head
from dlm_fast.ops import Rng, Stream, token_stats

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DRAWS = {"argmax": 0.0, "gumbel": 1.0}


def dense(head: Head, temperature: float, gather_first: bool):
    hidden = head.hidden[head.rows] if gather_first else head.hidden
    logits = F.linear(hidden, head.weight).float()
    logprob = logits.log_softmax(-1)
    probability = logprob.exp()
    entropy = -(probability * logprob).sum(-1)
    best = probability.topk(2).values
    score = logits
    if temperature > 0:
        score = logits / temperature - torch.log(-torch.log(torch.rand_like(logits)))
    token = score.argmax(-1)
    confidence = probability.gather(1, token[:, None])[:, 0]
    return token, confidence, logits.logsumexp(-1), entropy, best[:, 0] - best[:, 1]


@pytest.mark.parametrize("provider", ["eager_gather_first", "eager_all_positions", "dlm_fast"])
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_token_stats(benchmark, size, dtype, draw, provider):
    head = make_head(SIZES[size], DTYPES[dtype])
    rng = Rng.of(0, Stream.TOKEN, list(range(SIZES[size].n)))
    benchmark.group = f"token_stats {draw} {size} {dtype}"
    describe(benchmark, SIZES[size], DTYPES[dtype], 2)

    def ours():
        return token_stats(
            head.hidden, head.weight, rows=head.rows, temperature=DRAWS[draw], rng=rng
        )

    with torch.no_grad():
        if provider == "dlm_fast":
            result = benchmark(ours)
        else:
            gather_first = provider == "eager_gather_first"
            result = benchmark(dense, head, DRAWS[draw], gather_first)
    assert result[0].dtype == torch.int64
