"""One token and its statistics per selected row of a language-model head, without gradient.

Statistics are those of the untempered distribution over the allowed columns. The token is the most
likely one, or an exact draw: the argmax of ``z / temperature + Gumbel noise`` over the columns that
the filters leave.

Letters: ``T`` rows of hidden states, ``D`` width, ``V`` vocabulary, ``N`` selected rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, extension
from dlm_fast.ops._cuda_tokens import TokenDraw, choose_tokens
from dlm_fast.ops._head_inputs import (
    IGNORED,
    bound_inputs,
    check_device,
    check_head_inputs,
    empty_rows,
    unit_stride,
)
from dlm_fast.ops._head_reference import allowed_logits_ref, entropy_ref
from dlm_fast.ops.philox import Rng, gumbel, philox_uniform_ref
from dlm_fast.ops.token_logprob import cuda_call


class TokenStats(NamedTuple):
    """Statistics of N rows, float32 (float64 for float64 inputs)."""

    token: Tensor
    """int64 [N]"""
    confidence: Tensor
    """[N], untempered probability of ``token``"""
    lse: Tensor
    """[N], log of the sum of the exponentials of the logits"""
    entropy: Tensor
    """[N], nats"""
    margin: Tensor
    """[N], difference of the two largest probabilities, 0 on a tie"""
    logprob: Tensor
    """[N], log-probability of the targets if given, else of ``token``"""


@torch.no_grad()
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbid_ids: Sequence[int] = (),
    rng: Rng | None = None,
) -> TokenStats:
    """``hidden``, ``weight``, ``rows``, ``bias``, ``forbid_ids`` as in ``token_logprob``.

    ``temperature`` 0 takes the most likely token, the lowest id on a tie; above 0 a token is drawn
    with the numbers of ``rng`` (one entry per selected row). ``top_k`` (0: all) keeps the k largest
    tempered logits, then ``top_p`` the smallest set of mass at least ``top_p`` among them (at
    least one token); ties go to the lowest id. ``targets`` only choose ``logprob``; -100 gives 0.
    """
    op = "token_stats"
    checked = check_head_inputs(op, hidden, weight, targets, rows, bias, forbid_ids)
    num_rows = hidden.shape[0] if checked.rows_N is None else checked.rows_N.shape[0]
    _check_draw(op, hidden, temperature, top_k, top_p, rng, num_rows)
    if temperature == 0:
        rng = None
    return TokenStats(
        *_token_stats(
            checked.hidden_TD,
            checked.weight_VD,
            checked.targets_N,
            checked.rows_N,
            checked.bias_V,
            float(temperature),
            top_k,
            float(top_p),
            checked.forbid_ids,
            None if rng is None else rng.keys,
            None if rng is None else rng.position,
            None if rng is None else rng.step,
            0 if rng is None else rng.draw,
        )
    )


def _check_draw(
    op: str,
    hidden: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    rng: Rng | None,
    num_rows: int,
) -> None:
    if not (isinstance(temperature, int | float) and 0 <= temperature < math.inf):
        raise ValueError(f"{op}: temperature must be a finite number >= 0, got {temperature!r}")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"{op}: top_k must be an integer >= 0 (0 keeps all), got {top_k!r}")
    if not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise ValueError(f"{op}: top_p must lie in (0, 1] (1 keeps all), got {top_p!r}")
    if temperature == 0:
        return
    if rng is None:
        raise ValueError(
            f"{op}: temperature {temperature} draws tokens and needs rng=Rng.of(seed, "
            "Stream.TOKEN, sequence_ids), one entry per selected row"
        )
    check_device(op, hidden=hidden, keys=rng.keys, position=rng.position, step=rng.step)
    if rng.keys.shape[0] != num_rows:
        raise ValueError(
            f"{op}: rng has {rng.keys.shape[0]} entries for {num_rows} selected rows; "
            "use rng.take(sequence of each row).at(position=...)"
        )


def token_stats_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbid_ids: Sequence[int] = (),
    rng: Rng | None = None,
) -> TokenStats:
    """The definition: dense logits. Every backend must match it."""
    logits_NV = allowed_logits_ref(hidden, weight, rows, bias, 1.0, forbid_ids)
    logprob_NV = logits_NV.log_softmax(-1)
    if temperature == 0:
        token_N = _first_argmax(logits_NV)
    else:
        assert rng is not None
        tempered_NV = _filter_ref(logits_NV / temperature, top_k, top_p)
        noise_NV = gumbel(philox_uniform_ref(rng, logits_NV.shape[1]))
        token_N = _first_argmax(tempered_NV + noise_NV)
    token_logprob_N = logprob_NV.gather(1, token_N[:, None])[:, 0]
    logprob_N = token_logprob_N
    if targets is not None:
        kept_N = targets != IGNORED
        logprob_N = logprob_NV.gather(1, targets.where(kept_N, 0)[:, None])[:, 0]
        logprob_N = logprob_N.where(kept_N, 0.0)
    best_N2 = logits_NV.new_zeros(len(logits_NV), 2)
    best_N2[:, : logits_NV.shape[1]] = logprob_NV.exp().topk(min(2, logits_NV.shape[1])).values
    return TokenStats(
        token_N,
        token_logprob_N.exp(),
        torch.logsumexp(logits_NV, -1),
        entropy_ref(logprob_NV),
        best_N2[:, 0] - best_N2[:, 1],
        logprob_N,
    )


def _first_argmax(score_NV: Tensor) -> Tensor:
    """Lowest index of the maximum; NaN loses against numbers and wins against forbidden columns."""
    lowest = torch.finfo(score_NV.dtype).min
    score_NV = score_NV.nan_to_num(nan=lowest, posinf=math.inf, neginf=-math.inf)
    return (score_NV == score_NV.amax(-1, keepdim=True)).int().argmax(-1)


def _filter_ref(tempered_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Minus infinity outside the top_k largest and the smallest set of mass ``top_p`` of those."""
    vocabulary = tempered_NV.shape[1]
    if (top_k == 0 or top_k >= vocabulary) and top_p >= 1:
        return tempered_NV
    sorted_NV, order_NV = tempered_NV.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < vocabulary:
        sorted_NV[:, top_k:] = -math.inf
    if top_p < 1:
        probability_NV = sorted_NV.softmax(-1)
        before_NV = probability_NV.cumsum(-1) - probability_NV
        dropped_NV = before_NV >= top_p
        dropped_NV[:, 0] = False
        sorted_NV = sorted_NV.masked_fill(dropped_NV, -math.inf)
    return torch.full_like(tempered_NV, -math.inf).scatter(-1, order_NV, sorted_NV)


@torch.library.custom_op("dlm_fast::token_stats", mutates_args=())
def _token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    forbid_ids: list[int],
    keys: Tensor | None,
    position: Tensor | None,
    step: Tensor | None,
    draw: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    outputs = _empty_outputs(hidden, rows)
    counters = [None if c is None else c.contiguous() for c in (keys, position, step)]
    call = cuda_call(hidden, weight, None, rows, bias, 1.0, forbid_ids)
    if call is not None and call.real == torch.float32:
        chosen = TokenDraw(
            targets_N=targets,
            temperature=temperature or 1.0,
            top_k=top_k,
            top_p=top_p,
            keys=counters[0],
            position=counters[1],
            step=counters[2],
            draw=draw,
        )
        choose_tokens(call, chosen, dict(zip(TokenStats._fields, outputs, strict=True)))
        return outputs
    if call is not None:
        # float64 is for checks, where speed and memory matter less: the definition
        rng = None if keys is None else Rng(keys, position, step, draw)
        truth = token_stats_ref(
            hidden,
            weight,
            targets,
            rows=rows,
            bias=bias,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            forbid_ids=forbid_ids,
            rng=rng,
        )
        for output, value in zip(outputs, truth, strict=True):
            output.copy_(value)
        return outputs
    extension().token_stats_cpu(
        bound_inputs(hidden, weight, targets, rows, bias, 1.0, forbid_ids),
        temperature,
        top_k,
        top_p,
        addresses(*counters),
        draw,
        addresses(*outputs),
    )
    return outputs


def _empty_outputs(
    hidden: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = hidden.shape[0] if rows is None else rows.shape[0]
    token_N = torch.empty(num_rows, dtype=torch.int64, device=hidden.device)
    a, b, c, d, e = empty_rows(hidden, num_rows, 5)
    return token_N, a, b, c, d, e


@_token_stats.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    forbid_ids: list[int],
    keys: Tensor | None,
    position: Tensor | None,
    step: Tensor | None,
    draw: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(hidden, rows)
