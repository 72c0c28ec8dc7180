"""How an algorithm asks a policy for the log-probabilities of masked tokens.

Shapes: K masked copies, N masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_fast.algorithms.elbo import MaskedCopies
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility


class Scorer:
    """Asks a policy for the log-probabilities of masked tokens.

    ``bind(policy)`` comes first: the rows that predict a token depend on the policy's family.
    """

    def __init__(self, mask_id: int) -> None:
        self.mask_id = mask_id
        self._predicting_rows: Callable[[Tensor, Visibility], Tensor] | None = None

    def bind(self, policy: Any) -> None:
        """Takes what is needed from the bare policy; the forwards come with each call."""
        kind = policy.family.kind
        if kind != "full":
            raise ValueError(
                f"masked copies are scored under full attention, and this model's attention is "
                f"{kind!r}; take a model with full attention (LLaDA, Dream, tiny)"
            )
        self._predicting_rows = policy.predicting_rows

    def ell(self, copies: MaskedCopies, forward: Callable[..., Any]) -> Tensor:
        """[K]: ell of each copy, differentiable where ``forward`` is."""
        output = forward(copies.input_ids, copies.visibility, score=self._request(copies, None))
        return copies.ell(output.logprob)

    def weighted_ell(
        self, copies: MaskedCopies, weight_K: Tensor, forward: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """sum of weight * ell, a term of the loss as it is, and ell [K], detached.

        The weights are known before the forward, so the head's gradient is made inside it and no
        log-probability waits for the backward pass. Signs and scales of the loss belong into them.
        """
        weight_N = copies.per_row(weight_K * copies.weight_K)
        request = self._request(copies, weight_N)
        output = forward(copies.input_ids, copies.visibility, score=request)
        return output.objective, copies.ell(output.logprob.detach())

    def idle(self, score: Callable[..., Any], device: Any) -> None:
        """A forward whose result nobody reads, for a rank that has nothing left to score."""
        token = torch.tensor([self.mask_id], device=device)
        row = torch.zeros(1, dtype=torch.int32, device=device)
        request = ScoreRequest(rows=row, targets=torch.full_like(token, -100))
        score(token, Visibility.full([1]).to(device), score=request)

    def _request(self, copies: MaskedCopies, weight_N: Tensor | None) -> ScoreRequest:
        if self._predicting_rows is None:
            raise RuntimeError("call algorithm.modules(policy) before the first score or loss")
        rows = self._predicting_rows(copies.rows, copies.visibility)
        return ScoreRequest(
            rows=rows, targets=copies.targets, weights=weight_N, in_loss=weight_N is not None
        )
