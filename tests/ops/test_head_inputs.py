"""Bad input of the head ops is one clear error; registered ops pass opcheck."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from head_problems import problem
from torch._subclasses.fake_tensor import FakeTensorMode

from dlm_fast import _C
from dlm_fast.ops import (
    Rng,
    Stream,
    token_logprob,
    token_stats,
    weighted_logprob,
    weighted_logprob_,
)
from dlm_fast.ops._common import extension


def call(name, p, **options):
    """One of the head ops on a problem, with arguments replaced by options."""
    given = {"hidden": p.hidden, "weight": p.weight, "targets": p.targets, "rows": p.rows}
    given |= options
    if name.startswith("weighted"):
        given.setdefault("row_weight", torch.ones(len(p.targets)))
    if name == "weighted_logprob_":
        given.setdefault("weight_grad", torch.zeros(p.weight.shape))
    ops = (token_logprob, weighted_logprob, weighted_logprob_, token_stats)
    return {op.__name__: op for op in ops}[name](**given)


OPS = ["token_logprob", "weighted_logprob", "weighted_logprob_", "token_stats"]
BAD_INPUTS = [
    ({"hidden": torch.randn(9, 5)}, ValueError, "hidden has width 5 but weight has width 4"),
    ({"hidden": torch.randn(9, 4).bfloat16()}, TypeError, "hidden is torch.bfloat16 but weight"),
    ({"hidden": torch.ones(9, 4, dtype=torch.int64)}, TypeError, "hidden must be a float32"),
    ({"hidden": [[1.0]]}, TypeError, "hidden must be a float32.*got list"),
    ({"hidden": torch.randn(3, 3, 4)}, ValueError, r"hidden must have shape \[T, D\].*flatten"),
    ({"weight": torch.randn(11)}, ValueError, r"weight must have shape \[V, D\]"),
    ({"weight": torch.randn(0, 4)}, ValueError, "at least one row"),
    (
        {"weight": torch.randn(5, 0), "hidden": torch.randn(9, 0)},
        ValueError,
        "at least one row and column",
    ),
    ({"targets": torch.tensor([0, 11, 2, 3, 4, 5])}, ValueError, r"targets\[1\] is 11, outside"),
    ({"targets": torch.tensor([0, 1, 2, 3, 4, -1])}, ValueError, r"targets\[5\] is -1, outside"),
    ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, "one token id per entry of rows"),
    ({"targets": torch.zeros(6)}, TypeError, "targets must be an int64 tensor, got torch.float32"),
    ({"rows": None}, ValueError, r"one token id per row of hidden \(rows is None\), shape \(9,\)"),
    ({"rows": torch.tensor([0, 1, 2, 3, 4, 9])}, ValueError, "rows holds 9, but hidden has rows"),
    ({"rows": torch.tensor([0, -1, 2, 3, 4, 5])}, ValueError, "rows holds -1"),
    ({"rows": torch.ones(9, dtype=torch.bool)}, TypeError, r"for a mask use mask.nonzero\(\)"),
    ({"rows": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, r"rows must have shape \[N\]"),
    ({"bias": torch.zeros(10)}, ValueError, r"bias must have shape \(11,\)"),
    ({"bias": torch.zeros(11).half()}, TypeError, "bias must have the dtype of weight"),
    ({"forbid_ids": [11]}, ValueError, "forbid_ids holds 11, outside the vocabulary of 11"),
    ({"forbid_ids": [-1]}, ValueError, "forbid_ids holds -1"),
    ({"forbid_ids": range(11)}, ValueError, "forbids all 11 tokens"),
    ({"forbid_ids": torch.tensor([1])}, TypeError, r"use .tolist\(\)"),
    (
        {"forbid_ids": [3, 5], "targets": torch.tensor([0, 1, 2, 5, 4, 4])},
        ValueError,
        r"targets\[3\] is 5, which forbid_ids forbids",
    ),
    ({"temperature": -1.0}, ValueError, "temperature must be"),
    ({"temperature": math.nan}, ValueError, "temperature must be a finite number"),
    ({"temperature": math.inf}, ValueError, "temperature must be a finite number"),
    ({"temperature": "warm"}, ValueError, "temperature must be a finite number"),
]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("options", "error", "message"), BAD_INPUTS)
def test_bad_input(name, options, error, message):
    p = problem(6, 4, 11)
    p.targets[:] = torch.tensor([0, 1, 2, 4, 6, 10])
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        call(name, p, **options)


@pytest.mark.parametrize("name", OPS[:3])
def test_a_gradient_needs_a_temperature(name):
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        call(name, problem(6, 4, 11), temperature=0)


@pytest.mark.parametrize("name", OPS)
def test_all_tensors_lie_on_one_device(name):
    with FakeTensorMode():
        p = problem(6, 4, 11)
        p.hidden = torch.empty(9, 4, device="cuda")
        with pytest.raises(ValueError, match=f"{name}: weight lies on cpu but hidden on cuda:0"):
            call(name, p)
    with pytest.raises(ValueError, match="lies on meta; move it to the CPU or to a CUDA device"):
        call(name, problem(6, 4, 11), hidden=torch.empty(9, 4, device="meta"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"row_weight": torch.ones(5)}, ValueError, "one entry per target"),
        ({"row_weight": torch.ones(6, dtype=torch.int64)}, TypeError, "row_weight must be a float"),
        ({"row_weight": torch.ones(6, requires_grad=True)}, ValueError, "row_weight is a constant"),
    ],
)
def test_bad_row_weight(options, error, message):
    for name in OPS[1:3]:
        if name == "weighted_logprob_" and "constant" in message:
            continue  # the raw form has no autograd to mislead
        with pytest.raises(error, match=message):
            call(name, problem(6, 4, 11), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_grad": torch.zeros(11, 5)}, ValueError, "weight_grad must be contiguous"),
        ({"weight_grad": torch.zeros(4, 11).t()}, ValueError, "weight_grad must be contiguous"),
        ({"weight_grad": torch.zeros(11, 4).bfloat16()}, TypeError, "must be a torch.float32"),
        (
            {"weight_grad": torch.zeros(11, 4, requires_grad=True)},
            ValueError,
            "must not require grad",
        ),
        ({"bias_grad": torch.zeros(11)}, ValueError, "there is no bias"),
        (
            {"bias": torch.zeros(11), "bias_grad": torch.zeros(10)},
            ValueError,
            "bias_grad must be contiguous",
        ),
    ],
)
def test_bad_buffers(options, error, message):
    with pytest.raises(error, match=message):
        call("weighted_logprob_", problem(6, 4, 11), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0}, "needs rng=Rng.of"),
        ({"temperature": 1.0, "rng": Rng.of(0, Stream.TOKEN, [1])}, "1 entries for 6 selected"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"top_k": 1.5}, "top_k must be an integer >= 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p must lie in \(0, 1\]"),
    ],
)
def test_bad_draw(options, message):
    with pytest.raises(ValueError, match=message):
        call("token_stats", problem(6, 4, 11), **options)


@pytest.mark.parametrize(
    ("vocabulary", "target", "forbidden", "message"),
    [
        (1 << 25, 0, [], "vocabulary must not exceed"),
        (3, 7, [], "target out of range"),
        (3, 0, [2, 1], "sorted"),
        (3, 0, [1, 1], "sorted"),
        (0, 0, [], "sizes"),
    ],
)
def test_the_extension_checks_by_itself(vocabulary, target, forbidden, message):
    matrix, targets, out = torch.zeros(3, 2), torch.tensor([target]), torch.zeros(5, 1)
    addresses = (matrix.data_ptr(), matrix.data_ptr(), targets.data_ptr(), 0, 0)
    inputs = _C.HeadInputs((1, 1, 2, vocabulary), 0, (2, 2), addresses, 1.0, forbidden, 1)
    with pytest.raises(ValueError, match=message):
        _C.token_logprob_cpu(inputs, tuple(out[i].data_ptr() for i in range(5)), (0, 0))


def test_a_missing_extension_says_what_to_do(monkeypatch):
    monkeypatch.delattr("dlm_fast._C")
    monkeypatch.setitem(sys.modules, "dlm_fast._C", None)
    with pytest.raises(ImportError, match="pip install"):
        extension()


def operator(name):
    return getattr(torch.ops.dlm_fast, name).default


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(rows, dtype):
    p = problem(6, 4, 11, dtype, bias=True, spare=3 if rows else 0).leaves()
    chosen = p.rows if rows else None
    tail = (chosen, p.bias if rows else None, 0.7, [])
    for keep_logits in (False, True):
        torch.library.opcheck(operator("token_logprob"), (*p.head, *tail, keep_logits))
    weights = torch.randn(6)
    wanted = [True, True, rows]
    torch.library.opcheck(operator("weighted_logprob"), (*p.head, weights, *tail, wanted))
    frozen = [x.detach() for x in p.head]
    buffers = (torch.zeros(11, 4), torch.zeros(11) if rows else None)
    bias = p.bias.detach() if rows else None
    torch.library.opcheck(
        operator("weighted_logprob_"), (*frozen, weights, chosen, bias, 0.7, [], *buffers, 2.0)
    )
    keys = torch.arange(6)
    for draw in [
        (0.0, 0, 1.0, [10], None, None, None, 0),
        (1.0, 3, 0.9, [10], keys, None, None, 1),
    ]:
        torch.library.opcheck(operator("token_stats"), (*frozen, chosen, bias, *draw))
    forward = [*(torch.zeros(6) for _ in range(5)), torch.zeros(0)]
    torch.library.opcheck(
        operator("token_logprob_bwd"),
        (*frozen, chosen, bias, forward, torch.ones(6), None, None, 0.7, [], wanted),
    )


def test_a_second_derivative_is_refused():
    p = problem(6, 4, 11).leaves()
    objective = token_logprob(*p.head, rows=p.rows).logprob.sum()
    (grad,) = torch.autograd.grad(objective, p.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_ops_trace_under_compile():
    p = problem(6, 4, 11).leaves()

    def function(hidden, weight):
        return weighted_logprob(hidden, weight, p.targets, torch.ones(6), rows=p.rows).objective

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    compiled(p.hidden, p.weight).backward()
    q = p.leaves()
    function(q.hidden, q.weight).backward()
    assert torch.equal(p.hidden.grad, q.hidden.grad) and torch.equal(p.weight.grad, q.weight.grad)
