"""Transformers' backbones with attention under a visibility.

B sequences, S rows, H query heads, G key heads, d head width, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from dlm_fast.models.linear import Linear
from dlm_fast.models.tree_rows import KeptRows
from dlm_fast.ops.segment_attention import segment_attention
from dlm_fast.ops.visibility import Visibility

ATTENTION = "dlm_fast_visibility"


def visibility_attention(
    module: nn.Module,
    query_BHSd: Tensor,
    key_BGSd: Tensor,
    value_BGSd: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    visibility: Visibility | KeptRows | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention signature; the pattern arrives as the keyword ``visibility``."""
    refuse_mask(attention_mask)
    if visibility is None:
        raise ValueError(
            "this backbone needs to know who sees whom: call the Policy, or pass "
            "visibility=Visibility.full(lengths) to the backbone"
        )
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}, but random numbers come from keyed generators only; "
            "set attention_dropout to 0 in config.json"
        )
    # under autocast the rotary embedding leaves queries and keys in float32, values in 16 bits
    query, key = query_BHSd.to(value_BGSd.dtype), key_BGSd.to(value_BGSd.dtype)
    if isinstance(visibility, KeptRows):
        layer: Any = module.layer_idx
        out = visibility.attend(layer, query[0], key[0], value_BGSd[0], scaling)[None]
    else:
        out = segment_attention(query, key, value_BGSd, visibility, scaling)
    return out.transpose(1, 2).contiguous(), None


def refuse_mask(attention_mask: Tensor | None) -> None:
    """A padding mask would be lost in the packed layout; it must not be ignored in silence."""
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} is not supported; instead of padding, "
            "pack the sequences as input_ids [T] and pass visibility=Visibility.full(lengths)"
        )


AttentionInterface.register(ATTENTION, visibility_attention)


def empty_backbone(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The backbone with parameters on the meta device: nothing is drawn, nothing allocated."""
    config._attn_implementation = ATTENTION
    config.use_cache = False
    with torch.device("meta"):
        backbone = model_class(config)
    # buffers are computed, not loaded
    rotary_class: Any = type(backbone.rotary_emb)
    backbone.rotary_emb = rotary_class(config=config)
    for parent in list(backbone.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                assert isinstance(child.weight, nn.Parameter)
                setattr(parent, name, RMSNorm(child.weight, float(child.variance_epsilon)))  # type: ignore[arg-type]
            elif type(child) is nn.Linear:
                setattr(parent, name, Linear.like(child))
    # without a mask function of ours Transformers drops the mask before it reaches the attention
    backbone.register_forward_pre_hook(_refuse_mask_argument, with_kwargs=True)
    return backbone


def _refuse_mask_argument(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    refuse_mask(args[1] if len(args) > 1 else kwargs.get("attention_mask"))


def set_checkpointing(backbone: PreTrainedModel, enable: bool) -> None:
    """Recompute each layer in the backward pass, or stop doing so."""
    word = "enable" if enable else "disable"
    options = [{"use_reentrant": False}] if enable else []
    # the method has a new name since Transformers 5.2x, and the old one warns
    method = getattr(backbone, f"activation_checkpointing_{word}", None)
    (method or getattr(backbone, f"gradient_checkpointing_{word}"))(*options)


class RMSNorm(nn.Module):
    """The families' root-mean-square norm, in float64 where the input is.

    Transformers' own rounds to float32, which would hide errors from tests of exactness.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        wide = hidden_BSD.to(torch.promote_types(hidden_BSD.dtype, torch.float32))
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(hidden_BSD.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
