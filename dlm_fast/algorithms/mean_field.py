"""Log-probabilities of responses from one state: the prompt, and every token behind it masked.

    log p(o_k | q) = log softmax(z_k)[o_k],   z the logits of [q; mask, mask, ...]

The state does not depend on the response, so all rollouts of a prompt share one forward and one
sweep over the vocabulary for each position. Sources: diffu-GRPO (d1, arXiv 2504.12216), IGPO (arXiv
2509.10396); the sharing is ours.

Letters: ``L`` positions of the window, ``G`` rollouts of a prompt, ``N`` = prompts times L,
``T`` packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_fast.models.requests import ScoreOutput, ScoreRequest
from dlm_fast.ops import Visibility

IGNORED = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedWindows:
    """Prompts with masked windows behind them, and what their rollouts hold there."""

    input_ids: Tensor
    """int64 [T]"""
    visibility: Visibility
    rows: Tensor
    """int32 [N], rows that predict the windows' tokens"""
    targets: Tensor
    """int64 [N, G], -100 where a rollout has no token; prompts with fewer rollouts leave columns
    out"""
    forbid_ids: tuple[int, ...] = ()

    def score(self, forward: Callable[..., Any]) -> ScoreOutput:
        """``logprob`` float [N, G] and ``entropy`` [N], differentiable where ``forward`` is."""
        request = ScoreRequest(rows=self.rows, targets=self.targets, forbid_ids=self.forbid_ids)
        return forward(self.input_ids, self.visibility, score=request)


def masked_windows(
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[Tensor]],
    *,
    policy: Any,
    forbid_ids: Sequence[int],
    window: int,
    device: Any = "cpu",
    hidden_prompt: Sequence[Tensor] | None = None,
) -> MaskedWindows:
    """``responses``: of each prompt, int64 [up to L]. ``hidden_prompt``: bool [P] of each, prompt
    tokens that are masked too."""
    family = policy.family
    if family.kind != "full":
        raise ValueError(
            "a state in which the whole response is masked needs full attention, and this model's "
            f"attention is {family.kind!r}; take a model with full attention (LLaDA, Dream, tiny)"
        )
    most = max(len(members) for members in responses)
    ids, targets = [], torch.full((len(prompts), window, most), IGNORED, dtype=torch.int64)
    for p, (prompt, members) in enumerate(zip(prompts, responses, strict=True)):
        hidden = hidden_prompt[p] if hidden_prompt is not None else torch.zeros(len(prompt)).bool()
        ids += [
            prompt.masked_fill(hidden, family.mask_id),
            prompt.new_full((window,), family.mask_id),
        ]
        for g, member in enumerate(members):
            targets[p, : len(member), g] = member
    lengths = [len(prompt) + window for prompt in prompts]
    ends = torch.tensor(lengths).cumsum(0)
    rows = (ends[:, None] - window + torch.arange(window)).flatten().to(torch.int32)
    visibility = Visibility.full(lengths)
    return MaskedWindows(
        input_ids=torch.cat(ids).to(device),
        visibility=visibility.to(device),
        rows=policy.predicting_rows(rows, visibility).to(device),
        targets=targets.flatten(0, 1).to(device),
        forbid_ids=tuple(forbid_ids),
    )
