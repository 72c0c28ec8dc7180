"""The CUDA path of the likelihood ops in chunks and groups, with and without clusters."""

from __future__ import annotations

import importlib

import pytest
import torch
from head_problems import cotangents, problem, relative_error

from dlm_fast.ops import _cuda_head, token_logprob, token_logprob_ref, weighted_logprob_
from dlm_fast.ops._executor import emulated

# the function of the same name hides the module as an attribute of the package
op_module = importlib.import_module("dlm_fast.ops.token_logprob")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def steps(p, row_weight):
    """Forward, backward and the raw step."""
    q = p.leaves()
    result = token_logprob(*q.head, rows=q.rows, bias=q.bias, temperature=1.2, forbid_ids=[2])
    terms = zip(result, cotangents(len(p.targets)), strict=True)
    sum((x * c.to(x.dtype)).sum() for x, c in terms).backward()
    sums = torch.full(p.weight.shape, 0.5, dtype=result.lse.dtype)
    raw = weighted_logprob_(*p.head, row_weight, rows=p.rows, weight_grad=sums, alpha=2.0)
    values = [*(x.detach() for x in result), *raw, sums]
    return values + [x.grad for x in (q.hidden, q.weight, q.bias)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_chunks_and_groups_change_nothing(dtype, monkeypatch):
    """Three chunks of 64 rows, in groups of two, against one chunk; rows repeat and are ignored."""
    p = problem(150, 20, 97, dtype, bias=True)
    p.rows[70] = p.rows[1]
    p.targets[p.targets == 2] = 3
    p.targets[[5, 100]] = -100
    row_weight = cotangents(150)[0].to(torch.float64 if dtype == torch.float64 else torch.float32)
    with emulated("reverse", clusters=False):
        whole = steps(p, row_weight)
        monkeypatch.setattr(_cuda_head, "LOGITS_BYTES", 1)
        monkeypatch.setattr(_cuda_head, "MAX_GROUP", 128)
        parts = steps(p, row_weight)
    wide = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 1e-6)
    halves = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for part, one in zip(parts, whole, strict=True):
        # sums of different order, and in 16 bits rounded once more
        assert relative_error(part, one) < halves.get(part.dtype, wide)


@pytest.mark.covers(
    *(f"row_step_cluster_f32_{name}" for name in ("f32", "bf16", "f16")), "row_stats_cluster_f32"
)
def test_clusters_read_the_same_rows(monkeypatch):
    monkeypatch.setattr(op_module, "reads_head_directly", lambda call: False)
    for dtype in FLOATS[:3]:
        p = problem(9, 24, 1031, dtype, bias=True)
        p.targets[p.targets == 2] = 3
        row_weight = cotangents(9)[1].float()
        with emulated("reverse", clusters=False):
            two_reads = steps(p, row_weight)
        with emulated("random", seed=5, clusters=True):
            one_read = steps(p, row_weight)
        for a, b in zip(one_read, two_reads, strict=True):
            assert relative_error(a, b) < (2e-6 if a.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("few", [True, False])
def test_numbers_out_of_range_give_nan_where_nobody_looks(monkeypatch, few):
    """On a device the values of rows and targets are not checked: that would wait for it."""
    monkeypatch.setattr("dlm_fast.ops._head_inputs._can_look_at", lambda numbers: False)
    monkeypatch.setattr(op_module, "reads_head_directly", lambda call: few)
    p = problem(6, 8, 30, spare=0)
    p.rows[1], p.rows[2], p.targets[3] = 6, -1, 30
    bad = torch.tensor([False, True, True, True, False, False])
    with emulated():
        q = p.leaves()
        result = token_logprob(*q.head, rows=q.rows)
        assert torch.equal(result.logprob.isnan(), bad)
        result.logprob.nan_to_num().sum().backward()
    truth = token_logprob_ref(p.hidden, p.weight, p.targets[~bad], rows=p.rows[~bad])
    torch.testing.assert_close(result.logprob[~bad], truth.logprob)


def test_no_logits_of_all_rows_are_kept(monkeypatch):
    """The workspace of a call is bounded, whatever the number of rows."""
    sizes = []
    empty = _cuda_head.HeadCall.empty
    monkeypatch.setattr(
        _cuda_head.HeadCall,
        "empty",
        lambda call, *shape, dtype=None: (
            sizes.append(empty(call, *shape, dtype=dtype)) or sizes[-1]
        ),
    )
    monkeypatch.setattr(_cuda_head, "LOGITS_BYTES", 64 * 97 * 4)
    p = problem(700, 8, 97, spare=0)
    with emulated():
        token_logprob(*p.head, rows=p.rows)
    assert max(tensor.numel() for tensor in sizes) <= 64 * 104
