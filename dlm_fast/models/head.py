"""The output head, whose forward runs the fused ops on the rows that a request selects.

T packed rows, N selected rows, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm_fast.models.head_gradient import HeadGradient, objective_in_place
from dlm_fast.models.requests import LogitsRequest, ScoreOutput, ScoreRequest, StatsRequest
from dlm_fast.ops import TokenStats, token_logprob, token_stats, weighted_logprob


class Head(nn.Module):
    """A linear layer [V, D] that never makes [N, V] logits unless they are asked for.

    It is a module with a forward of its own, so that sharding wrappers may gather it alone.
    """

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD
        self.gradient: HeadGradient | None = None
        """where requests with ``in_loss`` add the head's gradient; None: autograd makes it"""

    def forward(
        self, hidden_TD: Tensor, request: ScoreRequest | StatsRequest | LogitsRequest
    ) -> ScoreOutput | TokenStats | Tensor:
        """Rows of requests count ``hidden``; logits may also be asked of [B, S, D]."""
        if isinstance(request, ScoreRequest) and self._adds_in_place(hidden_TD, request):
            return self._score_in_place(hidden_TD, request)
        hidden_TD, weight_VD = self._same_dtype(hidden_TD)
        if isinstance(request, LogitsRequest):
            return F.linear(hidden_TD, weight_VD)
        # the ops accumulate in float32 whatever they read; autocast must not round inside them
        with torch.autocast(hidden_TD.device.type, enabled=False):
            if isinstance(request, StatsRequest):
                return _stats(hidden_TD, weight_VD, request)
            return _score(hidden_TD, weight_VD, request)

    def _adds_in_place(self, hidden_TD: Tensor, request: ScoreRequest) -> bool:
        if self.gradient is None or not request.in_loss or request.weights is None:
            return False
        return torch.is_grad_enabled() and hidden_TD.requires_grad

    def _score_in_place(self, hidden_TD: Tensor, request: ScoreRequest) -> ScoreOutput:
        assert self.gradient is not None and request.weights is not None
        hidden_TD = _as_computed(hidden_TD)
        device = hidden_TD.device
        with torch.autocast(device.type, enabled=False):
            objective, logprob_N = objective_in_place(
                hidden_TD,
                self.weight,
                request.targets.to(device),
                request.weights.to(device),
                self.gradient,
                _options(request, device),
            )
        return ScoreOutput(logprob_N, None, None, objective)

    def _same_dtype(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and weight in the type that a linear layer would compute in."""
        hidden_TD = _as_computed(hidden_TD)
        return hidden_TD, self.weight.to(hidden_TD.dtype)

    def extra_repr(self) -> str:
        return f"vocab_size={self.weight.shape[0]}, width={self.weight.shape[1]}"


def _as_computed(hidden_TD: Tensor) -> Tensor:
    """In the type of autocast, if it is on."""
    device_type = hidden_TD.device.type
    if torch.is_autocast_enabled(device_type) and hidden_TD.dtype != torch.float64:
        return hidden_TD.to(torch.get_autocast_dtype(device_type))
    return hidden_TD


def _options(request: ScoreRequest, device: torch.device) -> dict[str, Any]:
    return {
        "rows": request.rows.to(device),
        "temperature": request.temperature,
        "forbid_ids": list(request.forbid_ids),
    }


def _stats(hidden_TD: Tensor, weight_VD: Tensor, request: StatsRequest) -> TokenStats:
    device = hidden_TD.device
    return token_stats(
        hidden_TD.detach(),
        weight_VD.detach(),
        None if request.targets is None else request.targets.to(device),
        rows=request.rows.to(device),
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        forbid_ids=list(request.forbid_ids),
        rng=request.rng,
    )


def _score(hidden_TD: Tensor, weight_VD: Tensor, request: ScoreRequest) -> ScoreOutput:
    device = hidden_TD.device
    if request.targets.dim() == 2:
        return _score_several(hidden_TD, weight_VD, request)
    targets_N = request.targets.to(device)
    options = _options(request, device)
    if request.weights is None:
        score = token_logprob(hidden_TD, weight_VD, targets_N, **options)
        return ScoreOutput(score.logprob, score.lse, score.entropy, None)
    weights_N = request.weights.to(device)
    weighted = weighted_logprob(hidden_TD, weight_VD, targets_N, weights_N, **options)
    return ScoreOutput(weighted.logprob, None, None, weighted.objective)


def _score_several(hidden_TD: Tensor, weight_VD: Tensor, request: ScoreRequest) -> ScoreOutput:
    """One sweep over the vocabulary for each row, and the logits of its targets by themselves."""
    if request.targets.shape[1] == 0:
        raise ValueError("targets [N, 0] asks for no token; give each row at least one")
    if request.weights is not None:
        raise ValueError(
            "weights are not for rows with several targets; leave them out and weigh logprob"
        )
    device = hidden_TD.device
    targets_NG, options = request.targets.to(device), _options(request, device)
    _check_allowed(targets_NG, request.forbid_ids)
    score = token_logprob(hidden_TD, weight_VD, targets_NG.max(1).values, **options)
    wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    hidden_ND = hidden_TD.index_select(0, options["rows"].long()).to(wide)
    chosen_NGD = F.embedding(targets_NG.clamp(min=0), weight_VD).to(wide)
    logit_NG = torch.bmm(chosen_NGD, hidden_ND[:, :, None])[:, :, 0]
    logprob_NG = logit_NG / request.temperature - score.lse[:, None]
    logprob_NG = logprob_NG.masked_fill(targets_NG < 0, 0.0)
    return ScoreOutput(logprob_NG, score.lse, score.entropy, None)


def _check_allowed(targets_NG: Tensor, forbid_ids: Sequence[int]) -> None:
    if targets_NG.device.type != "cpu":
        return  # reading values elsewhere would wait for the device
    forbidden = torch.isin(targets_NG, torch.tensor(list(forbid_ids), dtype=torch.int64))
    if bool(forbidden.any()):
        row, member = forbidden.nonzero()[0].tolist()
        raise ValueError(
            f"targets[{row}, {member}] = {int(targets_NG[row, member])} is one of forbid_ids"
        )
