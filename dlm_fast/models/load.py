"""From a checkpoint directory to a Policy: strict, without foreign code, without pickles."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlm_fast.models import tiny
from dlm_fast.models.checkpoint_directory import (
    OpenCheckpoint,
    empty_policy,
    open_checkpoint,
    some_tensors,
)
from dlm_fast.models.lora import add_adapters
from dlm_fast.models.lora_options import LoraOptions, lora_options
from dlm_fast.models.policy import Policy
from dlm_fast.models.save import checked_dtype
from dlm_fast.models.source import Source
from dlm_fast.models.text import tokenizer_from_files
from dlm_fast.models.token_facts import Overrides, family_facts

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    mask_id: int | None = None,
    eos_ids: Sequence[int] | None = None,
    block_size: int | None = None,
    max_length: int | None = None,
    lora: LoraOptions | Mapping[str, Any] | None = None,
    **tiny_options: Any,
) -> Policy:
    """A checkpoint directory, or "tiny" for the built-in model (options: ``TinyConfig``).

    Training wants ``dtype="float32"`` master weights whatever the file holds; "bfloat16" halves the
    memory for sampling, and for training with ``lora``, whose adapters are float32 all the same.
    ``mask_id``, ``eos_ids``, ``block_size`` and ``max_length`` replace what config and tokenizer
    say. ``lora`` adds adapters and freezes the rest (extra ``lora``).
    """
    parameter_dtype = checked_dtype(dtype)
    adapters = lora_options(lora)
    if str(path) == "tiny":
        # here they shape the network itself
        sizes = {"block_size": block_size, "max_length": max_length}
        tiny_options |= {key: size for key, size in sizes.items() if size is not None}
        overrides = Overrides(mask_id=mask_id, eos_ids=eos_ids)
        policy = _new_tiny(tiny.TinyConfig(**tiny_options), overrides)
        _cast(policy, parameter_dtype)
        policy = policy.to(device)
    elif tiny_options:
        raise TypeError(
            f'load() takes {", ".join(tiny_options)} for the built-in model "tiny" only'
        )
    else:
        overrides = Overrides(
            mask_id=mask_id, eos_ids=eos_ids, block_size=block_size, max_length=max_length
        )
        policy = _load_directory(Path(path), parameter_dtype, torch.device(device), overrides)
    if adapters.enabled:
        add_adapters(policy, adapters)
    return policy


def _new_tiny(config: tiny.TinyConfig, overrides: Overrides) -> Policy:
    checkpoint = tiny.checkpoint_config(config)
    files = {"config.json": json.dumps(checkpoint, indent=2).encode(), **tiny.tokenizer_files()}
    source = Source(format=tiny.FORMAT, files=files)
    blueprint = tiny.FORMAT.read_config(checkpoint)
    tokenizer = tokenizer_from_files(files)
    family = family_facts(checkpoint, {}, tiny.FORMAT, blueprint, tokenizer, overrides)
    policy = empty_policy(blueprint, family, source, tokenizer)
    # not to_empty: it would empty the rotary buffers too
    for name, parameter in list(policy.named_parameters()):
        _assign(policy, name, torch.empty(parameter.shape))
    tiny.initialise(policy, config.layers, config.seed)
    return policy


def _load_directory(
    directory: Path, dtype: torch.dtype, device: torch.device, overrides: Overrides
) -> Policy:
    with open_checkpoint(directory, overrides) as checkpoint:
        _load_tensors(checkpoint, dtype, device)
    return checkpoint.policy.to(device)


def _load_tensors(checkpoint: OpenCheckpoint, dtype: torch.dtype, device: torch.device) -> None:
    policy, files = checkpoint.policy, checkpoint.files
    damaged = []
    for tensor, name in checkpoint.parameter_of.items():
        # a copy: what was read may be a view of the file, which others can change
        value = files.read(tensor).to(device=device, dtype=dtype, copy=True)
        # the sum is not finite if a number is not, and costs no second tensor
        total = value.sum(dtype=torch.promote_types(dtype, torch.float32))
        if not total.isfinite() and not value.isfinite().all():
            damaged.append(tensor)
        _assign(policy, name, value)
    if damaged:
        logger.warning(
            "%s: %s holds numbers that are not finite (NaN or infinity), so nothing can be drawn "
            "from this model; the training that made it diverged, or dtype=%s is too narrow",
            files.path(damaged[0]),
            some_tensors(damaged),
            str(dtype).removeprefix("torch."),
        )
    policy.tie_weights()


def _cast(policy: Policy, dtype: torch.dtype) -> None:
    """Parameters alone: rounded rotary frequencies would be another model's."""
    for name, parameter in list(policy.named_parameters()):
        _assign(policy, name, parameter.detach().to(dtype))


def _assign(policy: nn.Module, name: str, value: Tensor) -> None:
    module_name, _, parameter = name.rpartition(".")
    setattr(policy.get_submodule(module_name), parameter, nn.Parameter(value))
