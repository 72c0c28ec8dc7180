"""Small checkpoints of the families whose keys and tensor names are Transformers' own."""

import json
from pathlib import Path
from typing import Any

import torch
from llada_directory import EMBEDDING_ROWS, VOCABULARY, write_tensors, write_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": EMBEDDING_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
# heads wider than hidden_size / num_attention_heads, as in Qwen3's smaller checkpoints
WIDE_HEADS = {"head_dim": 16}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "Dream": (Qwen2Config, Qwen2ForCausalLM, {}),
    "sdar": (Qwen3Config, Qwen3ForCausalLM, WIDE_HEADS),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, WIDE_HEADS),
    "llama": (LlamaConfig, LlamaForCausalLM, WIDE_HEADS),
}
CAUSAL = ("qwen2", "qwen3", "llama")
# keys of the published files that say nothing about the network
PUBLISHED: dict[str, dict[str, Any]] = {
    "Dream": {
        "architectures": ["DreamModel"],
        "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "max_window_layers": 28,
        "sliding_window": None,
    },
    "sdar": {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "attention_bias": False,
        "attn_implementation": "flex_attention",
        "block_size": 4,
        "debug": False,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "max_window_layers": 28,
        "micro_forward": False,
        "skip_checkpoint": False,
        "sliding_window": 4096,
        "use_deepep": False,
    },
}
TOKENS = {
    "bos_token_id": VOCABULARY["<|startoftext|>"],
    "eos_token_id": VOCABULARY["<|endoftext|>"],
    "pad_token_id": VOCABULARY["<|endoftext|>"],
}


def transformers_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Transformers' own model with random weights; biases and norms too are no constants."""
    config_class, model_class, sizes = FAMILIES[model_type]
    model = model_class(config_class(**(SIZES | sizes | TOKENS | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.05 * noise if parameter.dim() > 1 else 0.1 * noise + 1)
    return model.to(dtype)


def write_family_directory(
    directory: Path,
    model_type: str,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """``changes`` are config keys. The causal families are written by Transformers itself."""
    directory.mkdir(parents=True, exist_ok=True)
    model = transformers_model(model_type, seed=seed, dtype=dtype, **changes)
    if model_type in CAUSAL:
        size = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(directory, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    else:
        _, _, sizes = FAMILIES[model_type]
        written = {
            "model_type": model_type,
            **PUBLISHED[model_type],
            **SIZES,
            **sizes,
            **TOKENS,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "mask_token_id": VOCABULARY["<|mdm_mask|>"],
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": False,
            "use_sliding_window": False,
        }
        (directory / "config.json").write_text(json.dumps(written | changes, indent=2))
        tied = (written | changes)["tie_word_embeddings"]
        tensors = {k: v for k, v in model.state_dict().items() if not (tied and "lm_head" in k)}
        write_tensors(directory, tensors, shards)
        (directory / f"modeling_{model_type}.py").write_text("raise RuntimeError('executed')\n")
    if tokenizer:
        write_tokenizer(directory)
    return directory


def edit_config(directory: Path, without: tuple[str, ...] = (), **changes: Any) -> None:
    """Changes keys of config.json, or removes them."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in without}))
