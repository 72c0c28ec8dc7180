"""The forward pass that scores the target tokens of packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import Visibility


class PackedTargets(Protocol):
    """Rows of one pass, and which of them are targets."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def visibility(self) -> Visibility: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


def score_targets(
    policy: Any,
    packed: PackedTargets,
    forward: Callable[..., Any],
    weight_U: Tensor | None,
    *,
    temperature: float = 1.0,
    forbid_ids: Sequence[int] = (),
) -> Any:
    """``ScoreOutput`` of the targets [U]; with ``weight_U``, which is then the whole loss on the
    head, their weighted sum at the cost of one pass. ``forward`` is the (wrapped) ``policy``'s."""
    request = ScoreRequest(
        rows=policy.predicting_rows(packed.rows, packed.visibility),
        targets=packed.targets,
        weights=weight_U,
        temperature=temperature,
        forbid_ids=forbid_ids,
        in_loss=weight_U is not None,
    )
    return forward(packed.input_ids, packed.visibility, score=request)
