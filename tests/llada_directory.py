"""A small checkpoint in LLaDA's published format, with a tokenizer of bytes and a chat template."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: index for index, token in enumerate((*BYTES, *SPECIAL))}
EMBEDDING_ROWS = len(VOCABULARY) + 2
"""as in the published checkpoints, a little more than the tokenizer knows"""
CHAT_TEMPLATE = (
    "<|startoftext|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": EMBEDDING_ROWS,
    "eos_token_id": VOCABULARY["<|endoftext|>"],
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": VOCABULARY["<|mdm_mask|>"],
    "max_sequence_length": 512,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": VOCABULARY["<|endoftext|>"],
    "precision": None,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "vocab_size": len(VOCABULARY),
    "weight_tying": False,
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the family writes them."""
    width, inner, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    key_width = width // config["n_heads"] * config["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (rows, width)}
    for layer in range(config["n_layers"]):
        shapes |= {
            f"blocks.{layer}.attn_norm": (width,),
            f"blocks.{layer}.q_proj": (width, width),
            f"blocks.{layer}.k_proj": (key_width, width),
            f"blocks.{layer}.v_proj": (key_width, width),
            f"blocks.{layer}.attn_out": (width, width),
            f"blocks.{layer}.ff_norm": (width,),
            f"blocks.{layer}.ff_proj": (inner, width),
            f"blocks.{layer}.up_proj": (inner, width),
            f"blocks.{layer}.ff_out": (width, inner),
        }
    shapes["ln_f"] = (width,)
    if not config["weight_tying"]:
        shapes["ff_out"] = (rows, width)
    return {f"model.transformer.{name}.weight": shape for name, shape in shapes.items()}


def write_llada_directory(
    directory: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    without: tuple[str, ...] = (),
    **changes: object,
) -> Path:
    """``changes`` are config keys; ``without`` names keys to leave out."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in (CONFIG | changes).items() if k not in without}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [VOCABULARY["<|endoftext|>"], VOCABULARY["<|eot_id|>"]]})
    )
    # the family's own code travels along and is never run
    (directory / "modeling_llada.py").write_text("raise RuntimeError('this file was executed')\n")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.05 + (len(shape) == 1)).to(dtype)
        for name, shape in tensor_shapes(CONFIG | changes).items()
    }
    write_tensors(directory, tensors, shards)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i * shards // len(tensors)] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE(VOCABULARY, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_sequence_length"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
