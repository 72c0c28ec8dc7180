"""Logits that token_logprob keeps for its gradient: the same bits as logits computed again."""

from __future__ import annotations

import pytest
import torch
from head_problems import LEVELS, cotangents, problem, simd_level, threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast import _C
from dlm_fast.ops import token_logprob
from dlm_fast.ops._executor import emulated

forward = torch.ops.dlm_fast.token_logprob
backward = torch.ops.dlm_fast.token_logprob_bwd


def both_ways(p, given_cotangents, limit=None, forbid=(), temperature=0.8):
    """Outputs and gradients with kept logits, of which at most `limit` numbers, and without."""
    found = []
    for keep in (True, False):
        shape = (p.rows, p.bias, temperature, list(forbid))
        outputs = list(forward(*p.head, *shape, keep))
        assert outputs[5].numel() > 0 or not keep
        if limit is not None and keep:
            # what did not fit was never kept: the forward pass is told of the same room
            outputs[5] = outputs[5][:limit]
            addresses = tuple(x.data_ptr() for x in outputs[:5])
            _C.token_logprob_cpu(bound(p, temperature, forbid), addresses, room(outputs[5]))
        wanted = [True, True, p.bias is not None]
        gradients = backward(
            *p.head, p.rows, p.bias, outputs, *given_cotangents, temperature, list(forbid), wanted
        )
        found.append((outputs[:5], gradients))
    return found


def bound(p, temperature, forbid):
    from dlm_fast.ops._head_inputs import bound_inputs

    return bound_inputs(*p.head, p.rows, p.bias, temperature, list(forbid))


def room(kept):
    return kept.data_ptr(), kept.nbytes


def assert_same_bits(found):
    (outputs, gradients), (again, gradients_again) = found
    for ours, other in zip((*outputs, *gradients), (*again, *gradients_again), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(16, 70, 507), (33, 64, 2500), (520, 24, 300), (1100, 10, 700)])
def test_the_same_bits(level, dtype, shape):
    p = problem(*shape, dtype, bias=True)
    p.targets[::7] = -100
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    # without zeros: rows left out would change which rows are summed together
    values = [torch.where(c == 0, 0.5, c).to(kind) for c in cotangents(shape[0])]
    with simd_level(level), threads(2):
        assert_same_bits(both_ways(p, values, forbid=[3, 260]))


@settings(max_examples=30, deadline=None)
@given(st.integers(16, 1030), st.integers(1, 1500), st.integers(0, 400_000), st.data())
def test_any_room_will_do(n, v, limit, data):
    """Less room than the logits take: the rest is computed again; rows without cotangent, too."""
    p = problem(n, 8, v, seed=data.draw(st.integers(0, 9)))
    share = data.draw(st.sampled_from([0.0, 0.2, 0.7, 0.9, 1.0]))
    value = torch.randn(n) * (torch.rand(n) < share)
    # a row that takes no part may hold anything
    for row in (value == 0).nonzero()[:, 0].tolist()[:3]:
        p.hidden[int(p.rows[row])] = float("nan")
    (_, gradients), (_, again) = both_ways(p, (value, None, None), limit=limit)
    for ours, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=2e-5)


def kept_numbers(n, v, *, grad=True, dtype=torch.float32):
    """Numbers that a differentiable call holds besides its five statistics."""
    hidden = torch.randn(n, 4, dtype=dtype, requires_grad=grad)
    weight = torch.randn(v, 4, dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_logprob(hidden, weight, torch.zeros(n, dtype=torch.int64))
    # hidden, weight, targets, then the outputs
    return saved[-1].numel() if saved else None


def test_what_is_kept_is_bounded_and_only_for_gradients():
    assert kept_numbers(33, 300) == 64 * 504  # whole panels of rows, whole blocks of columns
    assert kept_numbers(4096, 20_000) * 4 == 80 << 20
    assert kept_numbers(4096, 20_000, dtype=torch.float64) * 8 == 80 << 20
    assert kept_numbers(15, 300) == 0  # so few rows that the product is next to free
    assert kept_numbers(33, 300, grad=False) is None
    hidden, weight = torch.randn(33, 4, requires_grad=True), torch.randn(300, 4)
    with torch.no_grad():
        assert not token_logprob(hidden, weight, torch.zeros(33, dtype=torch.int64)).lse.grad_fn
    with emulated():
        assert kept_numbers(33, 300) == 0


def test_a_graph_can_be_used_twice():
    p = problem(40, 16, 600).leaves()
    total = token_logprob(*p.head, rows=p.rows).logprob.sum()
    first = torch.autograd.grad(total, (p.hidden, p.weight), retain_graph=True)
    second = torch.autograd.grad(total, (p.hidden, p.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_with_any_number_of_rows():
    def loss(hidden, weight, targets):
        return token_logprob(hidden, weight, targets).logprob.sum()

    compiled = torch.compile(loss, dynamic=True, backend="aot_eager")
    for n in (20, 33, 70):
        p = problem(n, 16, 600, spare=0).leaves()
        mine = torch.autograd.grad(compiled(*p.head), p.weight)[0]
        assert torch.equal(mine, torch.autograd.grad(loss(*p.head), p.weight)[0])


def test_an_unaligned_room_is_refused():
    p = problem(20, 8, 300)
    out, space = torch.empty(5, 20), torch.empty(20_000)
    with pytest.raises(ValueError, match="aligned"):
        _C.token_logprob_cpu(
            bound(p, 1.0, []), tuple(x.data_ptr() for x in out), (space.data_ptr() + 4, 4096)
        )
