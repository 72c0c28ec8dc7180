"""Squared norm of each sample's gradient of the language-model head, without that gradient.

The logit gradients exist for one panel of vocabulary rows at a time. Samples of fewer rows than D
add up dz_i·dz_j over the panels and multiply by h_i·h_j at the end («gram»); others square the
panels' gradients («direct»), see ``sample_grad_norm``.
Letters: ``N`` selected rows, ``K`` samples, ``D`` width, ``V`` vocabulary, ``P`` panel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dlm_fast.ops._head_inputs import (
    IGNORED,
    HeadInputs,
    check_head_inputs,
    check_row_weight,
    check_temperature,
    output_dtype,
)
from dlm_fast.ops.sample_grad_norm import check_starts, sample_grad_norm
from dlm_fast.ops.token_logprob import token_logprob
from dlm_fast.ops.weighted_logprob import weighted_logprob_ref

PANEL = 4096
"""vocabulary rows whose logit gradients exist at a time"""
GRAM_ROWS = 1024
"""samples of more rows take the direct form: their Gram matrix would pass 4 MiB"""


def head_sample_grad_norm(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    starts: Tensor | Sequence[int],
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
) -> Tensor:
    """float64 [K]: squared norms of the gradient that ``weighted_logprob`` gives ``weight``.

    Sample k has the selected rows ``starts[k]`` to ``starts[k+1]``; other arguments as there.
    """
    op = "head_sample_grad_norm"
    with torch.no_grad():
        checked = check_head_inputs(op, hidden, weight, targets, rows, bias, forbid_ids)
        assert checked.targets_N is not None
        bounds = check_starts(op, starts, len(checked.targets_N)).tolist()
        dtype = output_dtype(hidden.dtype)
        scale = 1 / check_temperature(op, temperature)
        factor_N = scale * check_row_weight(op, row_weight, checked.targets_N, dtype)
        # rows that take no part may hold anything
        active_N = (checked.targets_N != IGNORED) & (factor_N != 0)
        hidden_ND = checked.hidden_TD
        if checked.rows_N is not None:
            hidden_ND = hidden_ND.index_select(0, checked.rows_N.long())
        hidden_ND = torch.where(active_N[:, None], hidden_ND, 0)
        targets_N = torch.where(active_N, checked.targets_N, IGNORED)
        lse_N = token_logprob(
            hidden_ND, weight, targets_N, bias=bias, temperature=temperature, forbid_ids=forbid_ids
        ).lse
        hidden_ND = hidden_ND.to(dtype)
        norms = _Norms(hidden_ND, bounds)
        for first in range(0, len(weight), PANEL):
            gradient_NP = _logits(checked, hidden_ND, first).mul_(scale).sub_(lse_N[:, None]).exp_()
            _forbid(gradient_NP, checked.forbid_ids, first)
            here_N = ((targets_N >= first) & (targets_N < first + PANEL)).nonzero()[:, 0]
            gradient_NP[here_N, targets_N[here_N] - first] -= 1
            norms.add(torch.where(active_N[:, None], gradient_NP * factor_N[:, None], 0))
        return norms.squares()


def head_sample_grad_norm_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    starts: Tensor | Sequence[int],
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
) -> Tensor:
    """The definition: one gradient per sample, in float64."""
    bounds, squares = torch.as_tensor(starts).tolist(), []
    rows = torch.arange(len(hidden)) if rows is None else rows
    for a, b in itertools.pairwise(bounds):
        leaf = weight.detach().double().requires_grad_()
        with torch.enable_grad():
            score = weighted_logprob_ref(
                hidden.detach().double(),
                leaf,
                targets[a:b],
                row_weight[a:b].double(),
                rows=rows[a:b],
                bias=None if bias is None else bias.double(),
                temperature=temperature,
                forbid_ids=forbid_ids,
            )
        squares.append(torch.autograd.grad(score.objective, leaf)[0].square().sum())
    return torch.stack(squares) if squares else torch.zeros(0, dtype=torch.float64)


class _Norms:
    """Sums over panels of the vocabulary."""

    def __init__(self, hidden_ND: Tensor, bounds: list[int]) -> None:
        self._hidden_ND, self._bounds = hidden_ND, bounds
        self._samples = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        longest = max((s.stop - s.start for s in self._samples), default=0)
        self._use_gram = longest < min(hidden_ND.shape[1], GRAM_ROWS)
        self._grams = [
            hidden_ND.new_zeros(s.stop - s.start, s.stop - s.start) for s in self._samples
        ]
        self._square_K = hidden_ND.new_zeros(len(self._samples), dtype=torch.float64)

    def add(self, gradient_NP: Tensor) -> None:
        if not self._use_gram:
            self._square_K += sample_grad_norm(
                gradient_NP, self._hidden_ND, self._bounds, method="direct"
            )
            return
        for sample, gram in zip(self._samples, self._grams, strict=True):
            gram.addmm_(gradient_NP[sample], gradient_NP[sample].t())

    def squares(self) -> Tensor:
        if self._use_gram:
            for k, (sample, gram) in enumerate(zip(self._samples, self._grams, strict=True)):
                own_ND = self._hidden_ND[sample]
                self._square_K[k] = (gram.double() * (own_ND @ own_ND.t()).double()).sum()
        return self._square_K


def _logits(checked: HeadInputs, hidden_ND: Tensor, first: int) -> Tensor:
    """[N, P], never rounded to 16 bits."""
    logits_NP = (
        hidden_ND @ checked.weight_VD[first : first + PANEL].detach().to(hidden_ND.dtype).t()
    )
    return (
        logits_NP if checked.bias_V is None else logits_NP + checked.bias_V[first : first + PANEL]
    )


def _forbid(probability_NP: Tensor, forbid_ids: Sequence[int], first: int) -> None:
    inside = [token - first for token in forbid_ids if first <= token < first + PANEL]
    probability_NP[:, inside] = 0
