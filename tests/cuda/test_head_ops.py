"""Streams, graphs and concurrency of the likelihood ops on a real device."""

from __future__ import annotations

import pytest
import torch
from head_problems import problem, relative_error

from dlm_fast.ops import Rng, Stream, token_logprob, token_stats, weighted_logprob_

pytestmark = pytest.mark.cuda


def on(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, **options):
    return problem(*shape, dtype, **options).to(device)


def test_a_stream_that_is_not_the_default(device):
    p = on(device, 300, 64, 5003)
    expected = token_logprob(*p.head, rows=p.rows).logprob
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        late = p.hidden.clone()
        torch.cuda._sleep(50_000_000)  # the op must wait for what its own stream does
        late.mul_(1)
        ours = token_logprob(late, p.weight, p.targets, rows=p.rows).logprob
    stream.synchronize()
    assert torch.equal(ours, expected)


def test_two_concurrent_calls(device):
    problems = [on(device, 300, 64, 5003, seed=seed) for seed in (1, 2)]
    expected = [token_logprob(*p.head, rows=p.rows).logprob for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in problems]
    results = []
    for p, stream in zip(problems, streams, strict=True):
        with torch.cuda.stream(stream):
            results.append(token_logprob(*p.head, rows=p.rows).logprob)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("num_rows", [5, 300])
def test_graph_capture_with_an_upper_bound_of_rows(device, num_rows):
    """Captured for 20 spare rows; replayed with other rows, fewer of them."""
    bound = num_rows + 20
    p = on(device, bound, 64, 5003)
    hidden, targets = p.hidden.clone(), p.targets.clone()
    sums = torch.zeros(p.weight.shape, device=device)
    row_weight = torch.ones(bound, device=device)
    rng = Rng.of(3, Stream.TOKEN, list(range(bound))).to(device)

    def work():
        step = weighted_logprob_(
            hidden, p.weight, targets, row_weight, rows=p.rows, weight_grad=sums
        )
        stats = token_stats(hidden, p.weight, rows=p.rows, temperature=1.0, rng=rng)
        return [*step, *stats]

    for _ in range(3):  # libraries set themselves up, kernels are loaded
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    other = on(device, bound, 64, 5003, seed=9)
    hidden.copy_(other.hidden)
    targets.copy_(other.targets)
    targets[num_rows:] = -100
    sums.zero_()
    graph.replay()
    replayed, graph_sums = [x.clone() for x in captured], sums.clone()
    sums.zero_()
    for value, expected in zip(replayed, work(), strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(graph_sums, sums)


def test_runs_repeat_bit_for_bit(device):
    p = on(device, 700, 128, 32003)
    row_weight = torch.randn(700, device=device)
    results = []
    for _ in range(3):
        sums = torch.zeros(p.weight.shape, device=device)
        results.append(
            [*weighted_logprob_(*p.head, row_weight, rows=p.rows, weight_grad=sums), sums]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("vocabulary", [126464, 151936])
def test_large_vocabularies(device, vocabulary):
    """Offsets beyond 2^31, and the error against float64 on the device."""
    num_rows = 17000 if torch.cuda.get_device_properties(device).total_memory > 100 << 30 else 300
    p = on(device, num_rows, 128, vocabulary)
    ours = token_logprob(*p.head, rows=p.rows)
    chosen = torch.arange(num_rows - 64, num_rows, device=device)
    exact = p.exact()
    logits = exact.hidden[p.rows[chosen].long()] @ exact.weight.t()
    truth = logits.log_softmax(-1).gather(1, p.targets[chosen, None])[:, 0]
    assert float((ours.logprob[chosen] - truth).abs().max()) < 1e-4


def test_chunks_do_not_change_more_than_the_last_bits(device):
    p = on(device, 4096, 256, 32003)
    whole = token_logprob(*p.head, rows=p.rows).logprob
    parts = torch.cat(
        [
            token_logprob(p.hidden, p.weight, targets, rows=rows).logprob
            for targets, rows in zip(p.targets.split(100), p.rows.split(100), strict=True)
        ]
    )
    assert relative_error(parts, whole) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_a_device_that_is_not_the_current_one():
    p = on(torch.device("cuda:1"), 100, 64, 997)
    with torch.cuda.device(0):
        result = token_logprob(*p.head, rows=p.rows)
    assert result.logprob.device == torch.device("cuda:1") and result.logprob.isfinite().all()
