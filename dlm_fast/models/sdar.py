"""SDAR and TraDo: a Qwen3 backbone under block-causal attention on the grid from position 0.

Source: SDAR, arXiv 2510.06303; TraceRL, arXiv 2509.06949; the config of their checkpoints.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from dlm_fast.models.family import Blueprint, FamilyFormat, config_value
from dlm_fast.models.transformers_format import read_backbone_config, tensor_name


def _read_config(config: dict[str, Any]) -> Blueprint:
    backbone = read_backbone_config(config, Qwen3Config)
    has_blocks = config.get("block_size") is not None
    return Blueprint(
        backbone_class=Qwen3Model,
        backbone_config=backbone,
        kind="block",
        logit_shift=0,
        head_rows=backbone.vocab_size,
        tied_head=bool(backbone.tie_word_embeddings),
        block_size=config_value(config, "block_size", int) if has_blocks else None,
        max_length=backbone.max_position_embeddings,
    )


FORMAT = FamilyFormat(
    model_type="sdar",
    read_config=_read_config,
    tensor_name=tensor_name,
    tokenizer_class=Qwen2Tokenizer,
)
