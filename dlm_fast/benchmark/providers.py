"""What is timed: one interface for our ops and for plain torch; other packages add theirs.

A provider does some of the works below and says why it lacks the others. Every work delivers the
same tensors whoever does it, or carries a mark.
Letters: ``T`` rows of hidden states, ``N`` of them selected, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlm_fast.benchmark import rivals
from dlm_fast.benchmark.problem import Head
from dlm_fast.ops import (
    Rng,
    Stream,
    token_logprob,
    token_stats,
    weighted_logprob,
    weighted_logprob_,
)

Delivered = dict[str, Tensor]
Logprob = Callable[[Head], Tensor]
NOT_ITS_WORK = "has no such call"
OURS = "dlm_fast"
STATISTICS = ("logprob", "lse", "entropy", "token", "confidence")


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Somebody who can do (some of) the works; None where he cannot."""

    name: str
    what: str
    """the call, for readers of the table"""
    score: Callable[[Head], Delivered] | None = None
    """logprob; no gradient"""
    statistics: Callable[[Head], Delivered] | None = None
    """logprob, lse, entropy, token (the most likely one) and its confidence; no gradient"""
    gradients: Callable[[Head], Delivered] | None = None
    """logprob and the gradients of sum(row_weight * logprob) in the types of the inputs"""
    weighted_step: Callable[[Head, Tensor], Delivered] | None = None
    """logprob, hidden_grad; the gradient of the head is added to a float32 buffer; the weights are
    known from the start"""
    step: Callable[[Head, Tensor], Delivered] | None = None
    """the same, the weights of the rows arrive after the forward pass"""
    decode: Callable[[Head, float], Delivered] | None = None
    """token and its confidence: the most likely one, or a draw at a temperature"""
    marks: Mapping[str, str] = field(default_factory=dict)
    """work -> what makes its numbers not quite comparable"""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """work -> why he cannot do it, if more is to be said than that there is no such call"""
    unavailable: str | None = None
    """why he cannot work on this machine at all"""
    compiles: bool = False
    """True where the first call at a new shape compiles code"""

    def why_not(self, work: str) -> str | None:
        """None where he can do the work."""
        if self.unavailable is not None:
            return self.unavailable
        return None if getattr(self, work) is not None else self.lacks.get(work, NOT_ITS_WORK)


def by_autograd(value: Logprob) -> dict[str, Any]:
    """The works that follow from a differentiable log-probability [N] of a head."""

    def score(head: Head) -> Delivered:
        with torch.no_grad():
            return {"logprob": value(head)}

    def gradients(head: Head) -> Delivered:
        head.clear()
        logprob_N = value(head)
        logprob_N.backward(head.row_weight.to(logprob_N.dtype))
        return {
            "logprob": logprob_N.detach(),
            "hidden_grad": _grad(head.hidden),
            "weight_grad": _grad(head.weight),
        }

    def step(head: Head, main_grad_VD: Tensor) -> Delivered:
        delivered = gradients(head)
        main_grad_VD.add_(delivered.pop("weight_grad"))
        return delivered

    return {"score": score, "gradients": gradients, "weighted_step": step, "step": step}


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


# --- ours


def _logprob(head: Head) -> Tensor:
    return token_logprob(head.hidden, head.weight, head.targets, rows=head.rows).logprob


@torch.no_grad()
def _statistics(head: Head) -> Delivered:
    found = token_stats(head.hidden, head.weight, head.targets, rows=head.rows)
    return {name: getattr(found, name) for name in STATISTICS}


def _weighted_gradients(head: Head) -> Delivered:
    head.clear()
    found = weighted_logprob(
        head.hidden, head.weight, head.targets, head.row_weight, rows=head.rows
    )
    found.objective.backward()
    return {
        "logprob": found.logprob,
        "hidden_grad": _grad(head.hidden),
        "weight_grad": _grad(head.weight),
    }


def _weighted_step(head: Head, main_grad_VD: Tensor) -> Delivered:
    _, logprob_N, hidden_grad_TD = weighted_logprob_(
        head.hidden,
        head.weight,
        head.targets,
        head.row_weight,
        rows=head.rows,
        weight_grad=main_grad_VD,
    )
    return {"logprob": logprob_N, "hidden_grad": hidden_grad_TD}


@functools.lru_cache(maxsize=8)
def _noise(n: int, device: torch.device) -> Rng:
    return Rng.of(0, Stream.TOKEN, torch.arange(n, device=device))


def _decode(head: Head, temperature: float) -> Delivered:
    rng = _noise(head.size.n, head.hidden.device) if temperature > 0 else None
    found = token_stats(head.hidden, head.weight, rows=head.rows, temperature=temperature, rng=rng)
    return {"token": found.token, "confidence": found.confidence}


def ours() -> Provider:
    works = by_autograd(_logprob) | {"gradients": _weighted_gradients}
    return Provider(
        name=OURS,
        what="`token_logprob`, `token_stats`, `weighted_logprob_` with the rows to select",
        **works | {"weighted_step": _weighted_step},
        statistics=_statistics,
        decode=_decode,
    )


def ours_later() -> Provider:
    """The form whose cotangents arrive later, where the other form is the default."""
    return Provider(
        name=f"{OURS}, token_logprob",
        what="`token_logprob`, then backward",
        gradients=by_autograd(_logprob)["gradients"],
    )


# --- plain torch


def _dense_statistics(head: Head, rows_only: bool) -> Delivered:
    hidden = head.hidden[head.rows] if rows_only else head.hidden
    with torch.no_grad():
        logits = torch.nn.functional.linear(hidden, head.weight).float()
        logprob = logits.log_softmax(-1)
        best = logprob.max(-1)
        found = {
            "lse": logits.logsumexp(-1),
            "entropy": -(logprob.exp() * logprob).sum(-1),
            "token": best.indices,
            "confidence": best.values.exp(),
        }
        if not rows_only:
            found = {name: value[head.rows] for name, value in found.items()}
            logprob = logprob[head.rows]
        return {"logprob": logprob.gather(1, head.targets[:, None])[:, 0], **found}


def _dense_decode(head: Head, temperature: float, rows_only: bool) -> Delivered:
    hidden = head.hidden[head.rows] if rows_only else head.hidden
    with torch.no_grad():
        logits = torch.nn.functional.linear(hidden, head.weight).float()
        probability = logits.softmax(-1)
        score = logits
        if temperature > 0:
            noise = -torch.log(-torch.log(torch.rand_like(logits)))
            score = logits / temperature + noise
        token = score.argmax(-1)
        confidence = probability.gather(1, token[:, None])[:, 0]
        found = {"token": token, "confidence": confidence}
        return found if rows_only else {n: value[head.rows] for n, value in found.items()}


def eager_gather_first() -> Provider:
    return Provider(
        name="eager, gather first",
        what="`F.linear` of the selected rows, float32, `F.cross_entropy`",
        **by_autograd(rivals.gather_first),
        statistics=functools.partial(_dense_statistics, rows_only=True),
        decode=functools.partial(_dense_decode, rows_only=True),
    )


def eager_all_positions() -> Provider:
    return Provider(
        name="eager, all positions",
        what="`F.linear` of every position, float32, `F.cross_entropy` with -100",
        **by_autograd(rivals.all_positions),
        statistics=functools.partial(_dense_statistics, rows_only=False),
        decode=functools.partial(_dense_decode, rows_only=False),
    )
