"""Checkpoints whose config keys and tensor names are Transformers' own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from dlm_fast.models.family import config_value

logger = logging.getLogger(__name__)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL: dict[str, type] = {
    "num_key_value_heads": int,
    "head_dim": int,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "hidden_act": str,
    "attention_bias": bool,
    "mlp_bias": bool,
    "tie_word_embeddings": bool,
}
"""left out or null: the default of Transformers' config class, which is what absence means"""
_OFF: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
}
"""what the backbones here do not compute, and the values that switch it off"""
_INERT = """
    architectures auto_map model_type bos_token_id eos_token_id pad_token_id mask_token_id
    block_size tokenizer_class max_new_tokens attn_implementation dtype torch_dtype
    transformers_version use_cache initializer_range pretraining_tp return_dict
    output_attentions output_hidden_states rope_theta rope_scaling rope_parameters layer_types
    sliding_window max_window_layers
    debug ep_size fuse_cross_entropy micro_forward skip_checkpoint use_deepep
"""
"""keys that are read elsewhere, checked below, or say how a framework runs the same network; the
last line is SDAR's training code"""

_FIXED_ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
}
"""rope types and the numbers each needs"""
_YARN_OPTIONAL = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "truncate",
)


def tensor_name(name: str) -> str:
    """Name in the checkpoint of a parameter of the Policy."""
    return name if name.startswith("lm_head.") else f"model.{name.removeprefix('backbone.')}"


def read_backbone_config(
    config: dict[str, Any], config_class: type[PreTrainedConfig]
) -> PreTrainedConfig:
    """The backbone's configuration, or a ValueError that names the key it cannot follow."""
    known = set(inspect.signature(config_class.__init__).parameters)
    family = config.get("model_type")
    arguments: dict[str, Any] = {key: config_value(config, key, int) for key in _SIZES}
    for key, kind in _OPTIONAL.items():
        if config.get(key) is None:
            continue
        value = config_value(config, key, kind)
        if key in known:
            arguments[key] = value
        elif key != "head_dim" and value:
            raise ValueError(f"config.json: {key} is {value!r}, which {family} does not compute")
    _check_switches(config)
    _check_heads(arguments, config)
    act = arguments.get("hidden_act", "silu")
    if act not in ACT2FN:
        raise ValueError(f"config.json: hidden_act {act!r} is no activation that Transformers has")
    _warn_unknown(config, known, str(family))
    arguments["rope_parameters"] = _rope(config, config_class)
    # an embedding's padding row would get no gradient, and nothing here pads
    arguments["pad_token_id"] = None
    try:
        return config_class(**arguments)
    except Exception as error:  # Transformers checks more, with errors of several libraries
        raise ValueError(f"config.json: {error}") from error


def _check_switches(config: dict[str, Any]) -> None:
    for key, off in _OFF.items():
        if key in config and config[key] not in off:
            raise ValueError(
                f"config.json: {key} is {config[key]!r}, which is not supported; only {off[0]!r} is"
            )
    other = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise ValueError(
            f"config.json: layer_types names {other[0]!r}; only 'full_attention' is supported"
        )


def _check_heads(arguments: dict[str, Any], config: dict[str, Any]) -> None:
    heads, width = arguments["num_attention_heads"], arguments["hidden_size"]
    key_heads = arguments.get("num_key_value_heads", heads)
    if heads % key_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{key_heads}"
        )
    if "head_dim" not in arguments and width % heads:
        raise ValueError(
            f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    given = config.get("head_dim")
    if given is not None and "head_dim" not in arguments and given != width // heads:
        raise ValueError(
            f"config.json: head_dim {given} differs from hidden_size / num_attention_heads = "
            f"{width // heads}, which {config.get('model_type')} computes with"
        )
    head_dim = arguments.get("head_dim", width // heads)
    if head_dim % 2:
        raise ValueError(
            f"config.json: heads of {head_dim} numbers cannot be turned in pairs (rotary "
            "embedding); head_dim must be even"
        )


def _warn_unknown(config: dict[str, Any], known: set[str], family: str) -> None:
    """Keys that are on and that nothing here reads: perhaps a variant, perhaps a tool's note."""
    read = known | set(_INERT.split()) | set(_SIZES) | set(_OPTIONAL) | set(_OFF)
    unknown = [k for k, v in config.items() if k not in read and v and not k.startswith("_")]
    if unknown:
        logger.warning(
            "config.json: %s unknown to %s; the network is computed without",
            f"{', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'}",
            family,
        )


def _rope(config: dict[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Rotary embedding in the form of Transformers 5, from either form of the file."""
    given = [key for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    if len(given) == 2 and config["rope_parameters"] != config["rope_scaling"]:
        raise ValueError("config.json: rope_parameters and rope_scaling differ; keep one of them")
    key = given[0] if given else "rope_scaling"
    scaling = config.get(key) or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"config.json: {key} must be an object, got {scaling!r}")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError(f"config.json: {key} differs between layers, which is not supported")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"config.json: {key} has the type {rope_type!r}, whose frequencies follow the longest "
            "sequence of the batch: a sequence would depend on its company. Use yarn or linear, or "
            f"remove {key} for sequences of the original length"
        )
    if rope_type not in _FIXED_ROPE:
        raise ValueError(
            f"config.json: {key} has the unknown type {rope_type!r}; known are "
            f"{', '.join(map(repr, _FIXED_ROPE))}"
        )
    _check_rope_numbers(scaling, key, rope_type)
    rope = {k: v for k, v in scaling.items() if k != "type" and v is not None}
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    default = getattr(config_class, "default_theta", 10_000.0)
    source = {"rope_theta": default if theta is None else theta}
    return rope | {"rope_type": rope_type, "rope_theta": config_value(source, "rope_theta", float)}


def _check_rope_numbers(scaling: dict[str, Any], key: str, rope_type: str) -> None:
    optional: Sequence[str] = _YARN_OPTIONAL if rope_type == "yarn" else ()
    for name in _FIXED_ROPE[rope_type]:
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"config.json: {key} of type {rope_type!r} needs {name} above 0, got {value!r}"
            )
    read = {"type", "rope_type", "rope_theta", *_FIXED_ROPE[rope_type], *optional}
    unknown = [name for name, value in scaling.items() if name not in read and value is not None]
    if unknown and not (unknown == ["partial_rotary_factor"] and scaling[unknown[0]] == 1):
        raise ValueError(
            f"config.json: {key} of type {rope_type!r} has {unknown[0]!r}, which is not computed"
        )
