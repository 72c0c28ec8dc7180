"""Value models: one number per row, from a copy of a policy's backbone or from the policy's own.

T packed rows, N selected rows, D width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dlm_fast.models.policy import Policy
from dlm_fast.ops.visibility import Visibility


class ValueHead(nn.Module):
    """A linear layer without bias, [D] -> 1, zero at first: the value of everything is then 0."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=like.dtype, device=like.device))

    def forward(self, hidden_TD: Tensor, rows: Tensor) -> Tensor:
        """float32 [N] (float64 where the weights are)."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden_TD.device.type, enabled=False):
            hidden_ND = hidden_TD.index_select(0, rows.to(hidden_TD.device).long())
            return hidden_ND.to(wide) @ self.weight.to(wide)


class SharedValue(nn.Module):
    """V from the policy's own hidden states, which it does not change."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.head = ValueHead(int(policy.config.hidden_size), policy.lm_head.weight)

    def forward(self, hidden_ND: Tensor | None = None, *, idle: bool = False) -> Tensor:
        """[N]: values of ``hidden_ND``. ``idle=True``: a scalar 0 with zero gradients."""
        if idle:
            return 0 * self.head.weight.sum()
        if hidden_ND is None:
            raise ValueError("a value head needs hidden states; only idle=True goes without")
        return self.head(hidden_ND, torch.arange(len(hidden_ND), device=hidden_ND.device))


class ValueModel(Policy):
    """V of the tokens at rows of a pack, read where they are still masked.

    Source: TraceRL, arXiv 2509.06949, section 4.3 (a diffusion value model with its own weights).
    """

    lm_head: ValueHead  # type: ignore[assignment]

    def __init__(self, policy: Policy) -> None:
        if policy.adapters is not None:
            raise ValueError(
                "a value model copies the backbone, and this policy has adapters on it; load the "
                "policy without lora, or put a value head on its hidden states "
                "(algorithm.value=shared)"
            )
        backbone = copy.deepcopy(policy.backbone)
        head = ValueHead(int(policy.config.hidden_size), policy.lm_head.weight)
        super().__init__(backbone, head, policy.family, policy.source)  # type: ignore[arg-type]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        visibility: Visibility | None = None,
        *,
        rows: Tensor | None = None,
        idle: bool = False,
    ) -> Any:
        """[N]: values at ``rows`` int [N]. ``idle=True``: a scalar 0 with zero gradients."""
        if idle:
            token_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            return 0 * self.lm_head(self._hidden(token_11, None), token_11[0]).sum()
        if input_ids is None or rows is None:
            raise ValueError("a value model needs input_ids and rows; only idle=True goes without")
        return self.lm_head(self._hidden(input_ids, visibility), rows)

    def tie_weights(self) -> None:
        """Nothing is tied: the head is no embedding."""
