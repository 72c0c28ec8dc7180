"""What the benchmarks time is right: data, truth, providers, clocks, memory."""

import math
import os
import sys

import pytest
import torch

from dlm_fast.benchmark import works
from dlm_fast.benchmark.memory import extra_bytes
from dlm_fast.benchmark.problem import HeadSize, make_head
from dlm_fast.benchmark.providers import STATISTICS
from dlm_fast.benchmark.timing import Plan, cpu_clock, interleaved, summary
from dlm_fast.benchmark.truth import draw_errors, errors, truth_of
from dlm_fast.ops import token_logprob_ref, token_stats_ref, weighted_logprob_ref

SMALL = HeadSize(40, 23, 31, 517)
PROVIDERS = [make() for make in works.PLAIN]


def test_data_is_like_a_language_models():
    """Median negative log-likelihood about 1.6 at V = 32000, as the protocol has it; flat: ln V."""
    size = HeadSize(64, 63, 1024, 32000)
    median = -truth_of(make_head(size, torch.bfloat16)).logprob.median()
    assert 1.0 < median < 2.6
    few = HeadSize(64, 63, 1024, 1000)
    flat = -truth_of(make_head(few, torch.float32, flat=True)).logprob.median()
    assert abs(flat - math.log(1000)) < 0.5


def test_data_is_the_same_each_time_and_selects_distinct_rows():
    one, two = (make_head(SMALL, torch.bfloat16, seed=3) for _ in range(2))
    assert torch.equal(one.hidden, two.hidden)
    assert torch.equal(one.weight, two.weight)
    assert len(one.rows.unique()) == SMALL.n
    labels = one.all_targets()
    assert torch.equal(labels[one.rows.long()], one.targets)
    assert (labels == -100).sum() == SMALL.t - SMALL.n


def test_truth_is_the_definition(monkeypatch):
    """Cut into blocks of rows and columns, it still equals the dense definition."""
    monkeypatch.setattr("dlm_fast.benchmark.truth._ROWS", 7)
    monkeypatch.setattr("dlm_fast.benchmark.truth._COLUMNS", 100)
    head = make_head(SMALL, torch.bfloat16)
    truth = truth_of(head)
    hidden = head.hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    stats = token_stats_ref(hidden, weight, head.targets, rows=head.rows)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(truth, name), getattr(stats, name))
    lse = token_logprob_ref(hidden, weight, head.targets, rows=head.rows).lse
    torch.testing.assert_close(truth.lse, lse)
    weighted_logprob_ref(
        hidden, weight, head.targets, head.row_weight.double(), rows=head.rows
    ).objective.backward()
    torch.testing.assert_close(truth.hidden_grad, hidden.grad)
    torch.testing.assert_close(truth.weight_grad, weight.grad.float())


def test_errors_measure_what_they_say():
    head = make_head(SMALL, torch.float32)
    truth = truth_of(head)
    token = truth.token.clone()
    token[0] += 1
    delivered = {
        "logprob": truth.logprob + 0.25,
        "token": token,
        "weight_grad": truth.weight_grad * 1.5,
        "something else": token,
    }
    found = errors(truth, delivered)
    assert set(found) == {"logprob", "token", "weight_grad"}
    assert found["logprob"] == pytest.approx(0.25)
    assert found["token"] == pytest.approx(1 / SMALL.n)
    assert found["weight_grad"] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("work", works.FLOP_PER_NDV)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_every_provider_delivers_the_same_tensors(provider, work):
    if provider.why_not(work) is not None:
        pytest.skip(provider.why_not(work))
    head = make_head(SMALL, torch.float32)
    main_grad = works.main_grad_of(head, work)
    call = works.bound(provider, work, head, main_grad)
    call()  # a second call must not see the first one's gradients
    found = works.checked(call, truth_of(head), main_grad)
    expected = {
        "score": {"logprob"},
        "statistics": set(STATISTICS),
        "decode": {"token", "confidence"},
    }.get(work, {"logprob", "hidden_grad", "weight_grad"})
    assert set(found) == expected
    assert max(found.values()) < 2e-5


def test_draws_have_the_probabilities_they_claim():
    head = make_head(SMALL, torch.float32)
    for provider in PROVIDERS:
        if provider.decode is None:
            continue
        drawn = works.bound(provider, "decode", head, None, temperature=1.0)()
        logprob = (head.hidden[head.rows] @ head.weight.T).log_softmax(-1)
        right = logprob.gather(1, drawn["token"][:, None])[:, 0].exp()
        torch.testing.assert_close(drawn["confidence"], right.detach(), check_dtype=False)
        assert draw_errors(head, truth_of(head), drawn)["confidence"] < 1e-6
        wrong = drawn | {"token": (drawn["token"] + 1) % SMALL.v}
        assert draw_errors(head, truth_of(head), wrong)["confidence"] > 1e-3


def test_calls_are_interleaved_in_rotating_order():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = interleaved(calls, cpu_clock, Plan(rounds=3, warm_ups=1))
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"
    assert [len(one) for one in times.values()] == [3, 3, 3]


def test_a_slow_provider_stops_after_three_calls():
    def clock(call):
        return {"cpu": float(call() or 0)}

    both = {"a": lambda: 1, "b": lambda: 2}
    times = interleaved(both, clock, Plan(rounds=9, patience=-1.0, always=("b",)))
    assert summary(times["a"])["calls"] == 3
    assert summary(times["b"])["calls"] == 9
    assert len(interleaved({"a": lambda: 1}, clock, Plan(rounds=2, seconds=0.01))["a"]) > 2


def test_summary():
    found = summary([{"wall": float(i)} for i in (5, 1, 4, 2, 3)])
    assert found == {
        "calls": 5,
        "wall_s": {"least": 1.0, "median": 3.0, "p20": pytest.approx(1.8), "p80": 4.2},
    }
    assert summary([{"wall": 2.0}])["wall_s"]["p80"] == 2.0


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="needs Linux's account of peak memory, and no sanitizer that keeps freed memory",
)
def test_memory_of_a_fresh_process():
    """Logits of 512 positions take 82 MB here; torch keeps them twice, we never do."""
    request = {"work": "score", "size": [512, 256, 8, 40000], "dtype": "float32", "threads": 1}
    setup = "dlm_fast.benchmark.works:plain_memory_calls"
    assert extra_bytes(setup, name="eager, all positions", **request) > 120e6
    assert extra_bytes(setup, name="dlm_fast", **request) < 12e6


def test_a_failing_process_says_why():
    with pytest.raises(RuntimeError, match="no_such_module"):
        extra_bytes("no_such_module:calls")
