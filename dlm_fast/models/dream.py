"""Dream: a Qwen2 backbone with full attention, where the row before a token predicts it.

Source: Dream 7B, arXiv 2508.15487, and the config of its checkpoints.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2Model, Qwen2Tokenizer

from dlm_fast.models.family import Blueprint, FamilyFormat
from dlm_fast.models.transformers_format import read_backbone_config, tensor_name


def _read_config(config: dict[str, Any]) -> Blueprint:
    backbone = read_backbone_config(config, Qwen2Config)
    return Blueprint(
        backbone_class=Qwen2Model,
        backbone_config=backbone,
        kind="full",
        logit_shift=1,
        head_rows=backbone.vocab_size,
        tied_head=bool(backbone.tie_word_embeddings),
        max_length=backbone.max_position_embeddings,
    )


FORMAT = FamilyFormat(
    model_type="Dream",
    read_config=_read_config,
    tensor_name=tensor_name,
    # the published directories hold the vocabulary and a tokenizer class of their own
    tokenizer_class=Qwen2Tokenizer,
)
