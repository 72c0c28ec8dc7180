"""The head ops hold a bounded part of the logits: peak memory of a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("resource")  # not on Windows
if "asan" in os.environ.get("LD_PRELOAD", ""):
    pytest.skip("the address sanitizer keeps freed memory", allow_module_level=True)

SCRIPT = """
import resource, sys
import torch
from dlm_fast import ops
from dlm_fast.ops import Rng, Stream
torch.set_num_threads(2)
rows, width, vocabulary = 4096, 8, 20000
hidden = torch.randn(rows, width, requires_grad=True)
weight = torch.randn(vocabulary, width, requires_grad=True)
targets = torch.randint(0, vocabulary, (rows,))

def call(n):
    head, target = (hidden[:n], weight), targets[:n]
    if sys.argv[1] == "token_logprob":
        ops.token_logprob(*head, target).logprob.sum().backward()
    elif sys.argv[1] == "weighted_logprob":
        ops.weighted_logprob(*head, target, torch.ones(n)).objective.backward()
    else:
        rng = Rng.of(0, Stream.TOKEN, list(range(n)))
        ops.token_stats(*head, temperature=1.0, top_k=int(sys.argv[2]), rng=rng)

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

call(8)
before = peak()
call(rows)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("op", "top_k", "limit_mb"),
    [
        ("token_stats", 0, 12),
        # gradients and filters keep the logits of one block of rows, 64 MiB of them at most
        ("token_stats", 50, 90),
        ("token_logprob", 0, 90),
        ("weighted_logprob", 0, 90),
    ],
)
def test_peak_memory(op, top_k, limit_mb, tmp_path):
    """Dense logits of these 4096 rows would take 328 MB, and their gradient as much again."""
    command = [sys.executable, "-c", SCRIPT, op, str(top_k)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < limit_mb * 1e6


# Allocates what the caller owns (inputs, outputs, gradients) beside the op, so that the rest is the
# op's own; a first call on few rows pays for what is loaded once.
OWN_SCRIPT = """
import resource, sys
import torch
from dlm_fast import ops
op, dtype, rows, vocabulary = sys.argv[1], getattr(torch, sys.argv[2]), *map(int, sys.argv[3:5])
torch.set_num_threads(2)
width = 1024
hidden = torch.randn(rows, width).to(dtype).requires_grad_()
weight = torch.empty(vocabulary, width, dtype=dtype).normal_().requires_grad_()
targets = torch.randint(0, vocabulary, (rows,))
main = torch.zeros(vocabulary, width)

def call(n, head):
    h, w = hidden[:n].detach().requires_grad_(), head.detach().requires_grad_()
    if op == "token_logprob":
        ops.token_logprob(h, w, targets[:n] % len(w)).logprob.sum().backward()
    elif op == "weighted_logprob":
        ops.weighted_logprob(h, w, targets[:n] % len(w), torch.ones(n)).objective.backward()
    elif op == "weighted_logprob_":
        _, _, h.grad = ops.weighted_logprob_(h.detach(), w.detach(), targets[:n] % len(w),
                                             torch.ones(n), weight_grad=main[:len(w)])
    else:
        ops.token_stats(h, w)
    return sum(x.grad.nbytes for x in (h, w) if x.grad is not None)

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

call(8, weight[:300])
before = peak()
owned = call(rows, weight)
print(peak() - before - owned)
"""

SMALL, LARGE = (254, 32000, 40), (256, 126464, 100)
CALLS = ["token_stats", "token_logprob", "weighted_logprob", "weighted_logprob_"]
CASES = [
    ("token_logprob", "float32", *SMALL),
    ("token_logprob", "bfloat16", *SMALL),
    ("weighted_logprob", "float32", *SMALL),
    ("weighted_logprob", "bfloat16", *SMALL),
    ("weighted_logprob_", "float32", *SMALL),
    *(
        pytest.param(op, dtype, *LARGE, marks=pytest.mark.slow)
        for op in CALLS
        for dtype in ("float32", "bfloat16")
    ),
]


@pytest.mark.parametrize(("op", "dtype", "rows", "vocabulary", "limit_mb"), CASES)
def test_own_memory(op, dtype, rows, vocabulary, limit_mb, tmp_path):
    """Beyond what the caller gets: a rounded gradient needs no float32 copy of itself."""
    arguments = [op, dtype, str(rows), str(vocabulary)]
    command = [sys.executable, "-c", OWN_SCRIPT, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < limit_mb * 1e6
