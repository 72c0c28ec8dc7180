"""Adapters on disk in peft's format: adapter_config.json and adapter_model.safetensors.

Names in the files are those of the source's own modules, so that peft puts the adapters where the
source itself loads: ``base_model.model.<module>.lora_A.weight``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm_fast.models.safetensors_files import replace_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDINGS = (".lora_A.weight", ".lora_B.weight")
_SILENT = """
    auto_mapping base_model_name_or_path exclude_modules inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type
    peft_version qalora_group_size r revision target_modules task_type use_rslora
"""
"""keys that are read, or say nothing about what is computed from the tensors"""
_PLAIN_INITS = (True, False, "gaussian", None)
"""others start from a changed base model, which the files do not hold"""


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedAdapters:
    """What a directory of adapters holds."""

    rank: int
    alpha: float
    use_rslora: bool
    weights: dict[str, tuple[Tensor, Tensor]]
    """A [r, I] and B [O, r] by the name of the layer in the Policy"""


def read_adapters(directory: str | Path, own_names: Mapping[str, str]) -> SavedAdapters:
    """Strictly: every tensor has a layer, every adapter both halves, nothing else changes it.

    ``own_names``: the name in the Policy of each of the source's linear layers.
    """
    folder = Path(directory)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; lora.adapter names a directory that peft's format has"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}); copy it again") from (
            error
        )
    rank = config["r"]
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        ending = next((e for e in _ENDINGS if name.endswith(e)), None)
        module = name.removeprefix(_PREFIX).removesuffix(ending or "")
        if ending is None or module not in own_names:
            raise ValueError(f"{path}: {name!r} is no adapter of a linear layer of this model")
        size = tensor.shape[0 if ending == _ENDINGS[0] else 1] if tensor.dim() == 2 else None
        if size != rank:
            raise ValueError(f"{path}: {name!r} {list(tensor.shape)} is not of rank {rank}")
        halves.setdefault(own_names[module], {})[ending] = tensor
    if not halves:
        raise ValueError(f"{path} holds no adapter")
    if lone := [name for name, pair in halves.items() if len(pair) < 2]:
        raise ValueError(f"{path} holds one half of the adapter of {lone[0]}")
    return SavedAdapters(
        rank=rank,
        alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        weights={name: (halves[name][_ENDINGS[0]], halves[name][_ENDINGS[1]]) for name in halves},
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        ok = config["peft_type"] == "LORA" and type(config["r"]) is int and config["r"] > 0
        ok = ok and config["lora_alpha"] > 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no readable configuration of adapters ({error!r})") from error
    if not ok:
        raise ValueError(f"{path}: peft_type must be LORA, with r and lora_alpha above 0")
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, whose base model is "
            "changed; convert the adapters with peft first"
        )
    changing = [
        key
        for key, value in config.items()
        if value and key not in _SILENT.split() and not (key == "bias" and value == "none")
    ]
    if changing:
        key = changing[0]
        raise ValueError(f"{path}: {key} is {config[key]!r}, which is not computed here")
    return config


def write_adapters(
    directory: Path,
    *,
    rank: int,
    alpha: float,
    use_rslora: bool,
    weights: Mapping[str, tuple[Tensor, Tensor]],
    all_modules: set[str],
) -> None:
    """``weights`` by the source's own names of layers, among ``all_modules`` of the source."""
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _target_modules(set(weights), all_modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": use_rslora,
    }
    tensors = {
        f"{_PREFIX}{name}{ending}": half.detach().cpu().contiguous()
        for name, pair in weights.items()
        for ending, half in zip(_ENDINGS, pair, strict=True)
    }
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    content = (json.dumps(config, indent=2) + "\n").encode()
    replace_file(directory / CONFIG, lambda path: path.write_bytes(content))


def _target_modules(adapted: set[str], all_modules: set[str]) -> list[str]:
    """Last parts of names, or whole names where a last part would name other layers too."""
    endings = {name.rpartition(".")[2] for name in adapted}
    named = {name for name in all_modules if name.rpartition(".")[2] in endings}
    return sorted(endings if named == adapted else adapted)
