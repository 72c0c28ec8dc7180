"""The built-in model: a small Llama backbone on single characters, made from a seed."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from dlm_fast.models.family import Blueprint, FamilyFormat, Kind, config_value
from dlm_fast.models.transformers_format import tensor_name

MODEL_TYPE = "dlm_fast_tiny"
_DIGITS = "0123456789"
_PRINTABLE = "".join(chr(code) for code in range(32, 127) if chr(code) not in _DIGITS)
# no printable ASCII, so that no text can be mistaken for a special token
EOS, PAD, MASK = "⟨eos⟩", "⟨pad⟩", "⟨mask⟩"
VOCABULARY = (*_DIGITS, *_PRINTABLE, "\n", EOS, PAD, MASK)


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Sizes of the built-in model."""

    kind: Kind = "full"
    """attention: full, block (block-causal) or causal"""
    block_size: int = 4
    """tokens per attention block, for kind block only"""
    logit_shift: int | None = None
    """1: row i - 1 predicts token i; none: 1 for kind causal, else 0"""
    width: int = 96
    """hidden width"""
    layers: int = 3
    """number of layers"""
    heads: int = 4
    """number of attention heads"""
    kv_heads: int | None = None
    """number of key-value heads; none: as many as heads"""
    max_length: int = 1024
    """longest sequence"""
    learned_positions: bool = False
    """add a learned vector per position; rotary embedding alone tells distances, not places"""
    seed: int = 0
    """of the initial weights"""

    def __post_init__(self) -> None:
        if self.kind not in ("full", "block", "causal"):
            raise ValueError(f"tiny.kind must be full, block or causal, got {self.kind!r}")
        if self.logit_shift not in (None, 0, 1):
            raise ValueError(f"tiny.logit_shift must be 0 or 1, got {self.logit_shift!r}")
        for name in ("block_size", "width", "layers", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"tiny.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"tiny.width must be a multiple of 2 * tiny.heads = {2 * self.heads} (rotary "
                f"embedding turns pairs), got {self.width}"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(
                f"tiny.kv_heads must divide tiny.heads = {self.heads}, got {self.kv_heads}"
            )


def checkpoint_config(options: TinyConfig) -> dict[str, Any]:
    """config.json of a new model."""
    shift = options.logit_shift
    return {
        "model_type": MODEL_TYPE,
        "kind": options.kind,
        "block_size": options.block_size,
        "logit_shift": int(options.kind == "causal") if shift is None else shift,
        "hidden_size": options.width,
        # the three matrices of a gated layer hold as much as two of 4 * width
        "intermediate_size": 8 * math.ceil(options.width / 3),
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads or options.heads,
        "max_position_embeddings": options.max_length,
        "learned_positions": options.learned_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": len(VOCABULARY),
        "eos_token_id": VOCABULARY.index(EOS),
        "pad_token_id": VOCABULARY.index(PAD),
        "mask_token_id": VOCABULARY.index(MASK),
    }


class PlacedLlamaModel(LlamaModel):
    """Llama with a learned vector per position, added to the token's.

    A cell of a grid is a place. From distances alone, a small model learns the rules of 4x4 Sudoku
    in about twice as many steps.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        assert config.max_position_embeddings is not None
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        embeds_BSD = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=embeds_BSD,
            **kwargs,
        )


def tokenizer_files() -> dict[str, bytes]:
    """tokenizer.json and its config: one token per character."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
    with tempfile.TemporaryDirectory() as directory:
        fast.save_pretrained(directory)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@torch.no_grad()
def initialise(policy: nn.Module, layers: int, seed: int) -> None:
    """Weights from the seed alone: every matrix keeps the size of its input.

    On Sudoku, embeddings of size 1 learn faster than the usual 0.02 in every matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        std = parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * layers)  # the residual stream sums 2 * layers of these
        elif name == "backbone.embed_tokens.weight":
            std = 1.0
        elif name == "backbone.embed_positions.weight":
            std = 0.5
        draw = torch.randn(parameter.shape, generator=generator) * std
        parameter.copy_(draw)


def _read_config(config: dict[str, Any]) -> Blueprint:
    kind, shift = config.get("kind"), config.get("logit_shift")
    if kind not in ("full", "block", "causal"):
        raise ValueError(f"config.json: kind must be full, block or causal, got {kind!r}")
    if shift not in (0, 1):
        raise ValueError(f"config.json: logit_shift must be 0 or 1, got {shift!r}")
    learned_positions = config.get("learned_positions", False)
    if not isinstance(learned_positions, bool):
        raise ValueError(
            f"config.json: learned_positions must be true or false, got {learned_positions!r}"
        )
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    return Blueprint(
        backbone_class=PlacedLlamaModel if learned_positions else LlamaModel,
        backbone_config=LlamaConfig(
            **{key: config_value(config, key, int) for key in sizes},
            rms_norm_eps=config_value(config, "rms_norm_eps", float),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config_value(config, "rope_theta", float),
            },
            tie_word_embeddings=False,
        ),
        kind=kind,
        logit_shift=shift,
        head_rows=config_value(config, "vocab_size", int),
        block_size=config_value(config, "block_size", int) if kind == "block" else None,
        max_length=config["max_position_embeddings"],
    )


FORMAT = FamilyFormat(model_type=MODEL_TYPE, read_config=_read_config, tensor_name=tensor_name)
