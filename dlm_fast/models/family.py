"""What a model family is: the facts users see, and how its checkpoints map onto a backbone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["full", "block", "causal"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of a loaded model that sampling and training depend on."""

    model_type: str
    """as in config.json"""
    kind: Kind
    """attention: over the whole sequence, block-causal, or causal"""
    logit_shift: int
    """0: row i predicts token i; 1: row i - 1 predicts it"""
    vocab_size: int
    """rows of the output head"""
    mask_id: int | None
    """token that stands for what is still to be decoded; None for autoregressive models"""
    eos_ids: tuple[int, ...] = ()
    """tokens that end a completion"""
    pad_id: int | None = None
    """token that the tokenizer pads with; nothing here pads"""
    block_size: int | None = None
    """tokens per attention block, for kind "block" only"""
    max_length: int | None = None
    """longest sequence the model was made for"""
    unused_ids: tuple[int, ...] = ()
    """rows of the head that the tokenizer has no token for (matrices are padded to round sizes);
    sampling never draws them"""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What one config.json says: the network to build and the facts that are not token ids."""

    backbone_class: type[PreTrainedModel]
    backbone_config: PreTrainedConfig
    kind: Kind
    logit_shift: int
    head_rows: int
    """rows of the output head"""
    tied_head: bool = False
    """the head is the embedding matrix, which the checkpoint holds once"""
    needs_mask: bool = True
    block_size: int | None = None
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class FamilyFormat:
    """How the checkpoints of one ``model_type`` are read and written."""

    model_type: str
    read_config: Callable[[dict[str, Any]], Blueprint]
    """raises a ValueError that names the key it cannot follow"""
    tensor_name: Callable[[str], str]
    """name of a parameter in the checkpoint, from its name in the Policy"""
    tokenizer_class: type[PreTrainedTokenizerBase] | None = None
    """reads directories that hold a vocabulary but no tokenizer.json; None: as Transformers finds
    it"""


def config_value(config: dict[str, Any], key: str, kind: type) -> Any:
    """config[key] if it is of this type (and above 0, if a number), else a ValueError that names
    the key."""
    if key not in config:
        raise ValueError(f"config.json lacks {key!r}")
    value: Any = config[key]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"config.json: {key} must be {kind.__name__}, got {value!r}")
    if isinstance(value, int | float) and kind is not bool and not 0 < value < math.inf:
        raise ValueError(f"config.json: {key} must be above 0, got {value!r}")
    return value
