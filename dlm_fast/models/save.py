"""Writing a Policy as a directory of its own family."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from dlm_fast.models.safetensors_files import replace_file, write_tensors
from dlm_fast.models.source import Source

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point type from its name."""
    known = DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return known


def _refuse_other_model(directory: Path, source: Source) -> None:
    """Files of two models in one directory would be read as one checkpoint."""
    path = directory / "config.json"
    if not path.is_file():
        return
    try:
        model_type = json.loads(path.read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        model_type = None
    if model_type != source.format.model_type:
        raise ValueError(
            f"{directory} holds a checkpoint of model_type {model_type!r}, not "
            f"{source.format.model_type!r}; save into a new directory"
        )


def save_checkpoint(
    directory: Path, state: dict[str, Tensor], source: Source, dtype: str | None
) -> None:
    """Config, tokenizer and code as in the source; tensors under the family's own names."""
    tensors = {
        source.format.tensor_name(name): tensor
        for name, tensor in state.items()
        if name != "lm_head.weight" or source.stores_tied_head or not source.tied_head
    }
    if (
        source.stores_tied_head
    ):  # files hold no tensor twice: the second one needs memory of its own
        head = source.format.tensor_name("lm_head.weight")
        tensors[head] = tensors[head].clone()
    if dtype is not None:
        wanted = {
            name: source.dtypes.get(name, tensor.dtype) if dtype == "source" else dtype
            for name, tensor in tensors.items()
        }
        tensors = {name: t.to(checked_dtype(wanted[name])) for name, t in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_other_model(directory, source)
    write_tensors(directory, tensors, source.shards)
    for name, content in source.files.items():
        replace_file(directory / name, lambda path, content=content: path.write_bytes(content))
