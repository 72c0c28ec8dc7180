"""What code for diffusion language models does: logits of all positions, float64 for decoding.

Letters: ``T`` rows of hidden states, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dlm_fast.benchmark.problem import Head
from dlm_fast.benchmark.providers import Delivered, Provider, by_autograd
from dlm_fast.benchmark.rivals import mask_after


@torch.no_grad()
def _decode(head: Head, temperature: float) -> Delivered:
    """Softmax and Gumbel noise of every position in float64; then the masked ones are picked.

    The noise has the form that such samplers use: exp(z) / (-ln u)^temperature.
    """
    logits_TV = F.linear(head.hidden, head.weight).double()
    noisy_TV = logits_TV
    if temperature > 0:
        noisy_TV = logits_TV.exp() / (-torch.log(torch.rand_like(logits_TV))) ** temperature
    token_T = noisy_TV.argmax(-1)
    probability_TV = logits_TV.softmax(-1)
    confidence_T = probability_TV.gather(1, token_T[:, None])[:, 0]
    return {"token": token_T[head.rows], "confidence": confidence_T[head.rows]}


def provider(device: str) -> Provider:
    return Provider(
        name="dLLM-style",
        what="logits of all positions, then the mask; decoding in float64",
        **by_autograd(mask_after),
        decode=_decode,
    )
