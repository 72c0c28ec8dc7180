"""Torch's own faster forms of the head: compiled, and its chunked linear cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_fast.benchmark.problem import Head
from dlm_fast.benchmark.providers import Provider, by_autograd


def _gathered(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden[rows], weight).float()
    return -F.cross_entropy(logits, targets, reduction="none")


def _everywhere(hidden: Tensor, weight: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return -F.cross_entropy(logits, labels, reduction="none")[rows]


def compiled_gather_first(device: str) -> Provider:
    compiled = torch.compile(_gathered, fullgraph=True, dynamic=False)

    def value(head: Head) -> Tensor:
        return compiled(head.hidden, head.weight, head.rows, head.targets)

    return Provider(
        name="compiled, gather first",
        what="`torch.compile` of the eager form, default mode",
        **by_autograd(value),
        compiles=True,
    )


def compiled_all_positions(device: str) -> Provider:
    compiled = torch.compile(_everywhere, fullgraph=True, dynamic=False)

    def value(head: Head) -> Tensor:
        return compiled(head.hidden, head.weight, head.rows, head.all_targets())

    return Provider(
        name="compiled, all positions",
        what="`torch.compile` of the eager form, default mode",
        **by_autograd(value),
        compiles=True,
    )


HAS_CHUNKED = hasattr(torch.nn, "LinearCrossEntropyOptions")


def chunked_logprob(head: Head) -> Tensor:
    """With options it computes chunks of rows; without them it is the eager form."""
    return -F.linear_cross_entropy(
        head.hidden[head.rows],
        head.weight,
        head.targets,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def chunked(device: str) -> Provider:
    return Provider(
        name="torch chunked, gather first",
        what="`F.linear_cross_entropy` with `LinearCrossEntropyOptions()`",
        **by_autograd(chunked_logprob),
        unavailable=None if HAS_CHUNKED else f"torch {torch.__version__} has none; 2.13 has",
    )
