"""The language-model head in plain torch, as training code writes it: log-probabilities [N].

Letters: ``T`` rows of hidden states, ``N`` of them selected, ``V`` vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dlm_fast.benchmark.problem import Head


def gather_first(head: Head) -> Tensor:
    """Selected rows, dense logits, cross-entropy in float32."""
    logits_NV = F.linear(head.hidden[head.rows], head.weight).float()
    return -F.cross_entropy(logits_NV, head.targets, reduction="none")


def all_positions(head: Head) -> Tensor:
    """Logits and losses of every position; those that count are picked at the end."""
    logits_TV = F.linear(head.hidden, head.weight).float()
    losses_T = F.cross_entropy(logits_TV, head.all_targets(), reduction="none")
    return -losses_T[head.rows]


def mask_after(head: Head) -> Tensor:
    """What code for diffusion language models does: logits of every position, then the mask."""
    logits_TV = F.linear(head.hidden, head.weight)
    return -F.cross_entropy(logits_TV[head.rows].float(), head.targets, reduction="none")
