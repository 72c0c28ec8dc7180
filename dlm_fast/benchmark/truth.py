"""Float64 values of a head's statistics and gradients, and the errors of others against them.

Letters: ``N`` selected rows, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_fast.benchmark.problem import Head

# Rows and columns per step: no [N, V] float64 array of a large head, no float64 copy of its weight.
_ROWS, _COLUMNS = 256, 8192

GRADIENTS = ("hidden_grad", "weight_grad")


@dataclass
class Truth:
    """From the exact inputs; gradients of the sum of row_weight * logprob."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    token: Tensor
    confidence: Tensor
    hidden_grad: Tensor
    """[T, D]"""
    weight_grad: Tensor
    """[V, D], stored as float32: its rounding is a tenth of any error measured"""


@torch.no_grad()
def truth_of(head: Head) -> Truth:
    """Costs three float64 matrix products."""
    weight_grad_VD = torch.zeros_like(head.weight, dtype=torch.float32)
    hidden_grad_TD = torch.zeros_like(head.hidden, dtype=torch.float64)
    values = []
    for first in range(0, head.size.n, _ROWS):
        part = slice(first, first + _ROWS)
        rows_N, targets_N = head.rows[part].long(), head.targets[part]
        hidden_ND = head.hidden[rows_N].double()
        blocks = head.weight.split(_COLUMNS)
        logits_NV = torch.cat([hidden_ND @ block.double().T for block in blocks], 1)
        logprob_NV = logits_NV.log_softmax(-1)
        chosen_N = logprob_NV.gather(1, targets_N[:, None])[:, 0]
        best = logprob_NV.max(-1)
        probability_NV = logprob_NV.exp()
        entropy_N = -(probability_NV * logprob_NV).sum(-1)
        values.append(
            (chosen_N, logits_NV.logsumexp(-1), entropy_N, best.indices, best.values.exp())
        )
        grad_NV = probability_NV.neg_()
        grad_NV[torch.arange(len(rows_N), device=rows_N.device), targets_N] += 1
        grad_NV *= head.row_weight[part].double()[:, None]
        for block, grad, out in zip(
            blocks,
            grad_NV.split(_COLUMNS, 1),
            weight_grad_VD.split(_COLUMNS),
            strict=True,
        ):
            out += grad.T @ hidden_ND
            hidden_grad_TD.index_add_(0, rows_N, grad @ block.double())
    logprob, lse, entropy, token, confidence = map(torch.cat, zip(*values, strict=True))
    return Truth(logprob, lse, entropy, token, confidence, hidden_grad_TD, weight_grad_VD)


@torch.no_grad()
def errors(truth: Truth, delivered: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of a statistic, relative Frobenius error of a gradient; of tokens the
    share that is not the most likely one."""
    found = {}
    for name, value in delivered.items():
        right = getattr(truth, name, None)
        if right is None:
            continue
        if name in GRADIENTS:
            found[name] = _relative(value, right)
        elif name == "token":
            found[name] = (value.long() != right).double().mean().item()
        else:
            found[name] = (value.double() - right).abs().max().item()
    return found


@torch.no_grad()
def draw_errors(head: Head, truth: Truth, delivered: Mapping[str, Tensor]) -> dict[str, float]:
    """Of a drawn token: its confidence against the float64 probability of that token."""
    token_N = delivered["token"].long()
    hidden_ND = head.hidden[head.rows].double()
    logit_N = (hidden_ND * head.weight[token_N].double()).sum(-1)
    wrong_N = delivered["confidence"].double() - (logit_N - truth.lse).exp()
    return {"confidence": wrong_N.abs().max().item()}


def _relative(value: Tensor, right: Tensor) -> float:
    difference = norm = 0.0
    for a, b in zip(value.split(_COLUMNS), right.split(_COLUMNS), strict=True):
        difference += (a.double() - b.double()).square().sum().item()
        norm += b.double().square().sum().item()
    return (difference / norm) ** 0.5 if norm else difference**0.5
