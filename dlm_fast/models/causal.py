"""Qwen2, Qwen3 and Llama: autoregressive models, as Transformers has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from dlm_fast.models.family import Blueprint, FamilyFormat
from dlm_fast.models.transformers_format import read_backbone_config, tensor_name


def _reader(
    backbone_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> Callable[[dict[str, Any]], Blueprint]:
    def read_config(config: dict[str, Any]) -> Blueprint:
        backbone = read_backbone_config(config, config_class)
        return Blueprint(
            backbone_class=backbone_class,
            backbone_config=backbone,
            kind="causal",
            logit_shift=1,
            head_rows=backbone.vocab_size,
            tied_head=bool(backbone.tie_word_embeddings),
            needs_mask=False,
            max_length=backbone.max_position_embeddings,
        )

    return read_config


QWEN2 = FamilyFormat(
    model_type="qwen2",
    read_config=_reader(Qwen2Model, Qwen2Config),
    tensor_name=tensor_name,
    tokenizer_class=Qwen2Tokenizer,
)
QWEN3 = FamilyFormat(
    model_type="qwen3",
    read_config=_reader(Qwen3Model, Qwen3Config),
    tensor_name=tensor_name,
    tokenizer_class=Qwen2Tokenizer,
)
LLAMA = FamilyFormat(
    model_type="llama", read_config=_reader(LlamaModel, LlamaConfig), tensor_name=tensor_name
)
