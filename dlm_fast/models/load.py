"""From a checkpoint directory to a Policy: strict, without foreign code, without pickles."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dlm_fast.models import tiny
from dlm_fast.models.backbone import empty_backbone
from dlm_fast.models.family import Blueprint, Family, FamilyFormat
from dlm_fast.models.head import Head
from dlm_fast.models.lora import add_adapters
from dlm_fast.models.lora_options import LoraOptions, lora_options
from dlm_fast.models.policy import Policy
from dlm_fast.models.registry import format_of
from dlm_fast.models.safetensors_files import TensorFiles
from dlm_fast.models.save import checked_dtype
from dlm_fast.models.source import Source, small_files
from dlm_fast.models.text import load_tokenizer, tokenizer_from_files
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
    policy = _empty_policy(blueprint, family, source, tokenizer)
    # not to_empty: it would empty the rotary buffers too
    for name, parameter in list(policy.named_parameters()):
        _assign(policy, name, torch.empty(parameter.shape))
    tiny.initialise(policy, config.layers, config.seed)
    return policy


def _load_directory(
    directory: Path, dtype: torch.dtype, device: torch.device, overrides: Overrides
) -> Policy:
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is no directory; give the folder of a checkpoint (config.json and "
            'safetensors files), or "tiny" for the built-in model. Nothing is downloaded here: '
            "`hf download NAME --local-dir DIR` fetches a published checkpoint"
        )
    config = _read_json(directory / "config.json")
    try:
        family_format = format_of(config)
        blueprint = family_format.read_config(config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    generation = directory / "generation_config.json"
    generation_config = _read_json(generation) if generation.is_file() else {}
    tokenizer = load_tokenizer(directory, family_format.tokenizer_class)
    try:
        family = family_facts(
            config, generation_config, family_format, blueprint, tokenizer, overrides
        )
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    with ExitStack() as stack:
        files = TensorFiles(directory, stack)
        tensors = _wanted(files, blueprint, family_format)
        source = Source(
            format=family_format,
            files=small_files(directory),
            tied_head=blueprint.tied_head,
            stores_tied_head=blueprint.tied_head and family_format.tensor_name(_HEAD) in tensors,
            shards={tensor: file for tensor, file in files.shards.items() if tensor in tensors},
            dtypes={tensor: files.dtype(tensor) for tensor in tensors},
        )
        policy = _empty_policy(blueprint, family, source, tokenizer)
        _load_tensors(policy, files, tensors, dtype, device)
    return policy.to(device)


_HEAD = "lm_head.weight"


def _wanted(files: TensorFiles, blueprint: Blueprint, family_format: FamilyFormat) -> set[str]:
    """Names of the tensors to load: all, but for those that say nothing new."""
    # older files hold the rotary frequencies, which follow from config.json
    tensors = {name for name in files.file_of if not name.endswith(".rotary_emb.inv_freq")}
    head = family_format.tensor_name(_HEAD)
    embedding = family_format.tensor_name("backbone.embed_tokens.weight")
    if (
        blueprint.tied_head
        and {head, embedding} <= tensors
        and not torch.equal(files.read(head), files.read(embedding))
    ):
        raise ValueError(
            f"{files.path(head)}: {head!r} differs from {embedding!r}, but config.json says that "
            "the two are one matrix (tie_word_embeddings, weight_tying); correct config.json"
        )
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a checkpoint directory needs it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _empty_policy(
    blueprint: Blueprint,
    family: Family,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Policy:
    """Parameters on the meta device."""
    backbone = empty_backbone(blueprint.backbone_class, blueprint.backbone_config)
    width = blueprint.backbone_config.hidden_size
    head = Head(nn.Parameter(torch.empty(blueprint.head_rows, width, device="meta")))
    policy = Policy(backbone, head, family, source, tokenizer)
    policy.tie_weights()
    return policy


def _load_tensors(
    policy: Policy, files: TensorFiles, tensors: set[str], dtype: torch.dtype, device: torch.device
) -> None:
    # a tied head appears once among the parameters, under the embedding's name
    parameters = dict(policy.named_parameters())
    names = {policy.source.format.tensor_name(name): name for name in parameters}
    if policy.source.stores_tied_head:
        tensors = tensors - {policy.source.format.tensor_name(_HEAD)}
    _check_names(files, tensors, set(names))
    for tensor, name in names.items():
        shape = list(parameters[name].shape)
        if files.shape(tensor) != shape:
            raise ValueError(
                f"{files.path(tensor)}: tensor {tensor!r} has shape {files.shape(tensor)}, but "
                f"config.json asks for {shape}"
            )
    damaged = []
    for tensor, name in names.items():
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
            _some(damaged),
            str(dtype).removeprefix("torch."),
        )
    policy.tie_weights()


def _cast(policy: Policy, dtype: torch.dtype) -> None:
    """Parameters alone: rounded rotary frequencies would be another model's."""
    for name, parameter in list(policy.named_parameters()):
        _assign(policy, name, parameter.detach().to(dtype))


def _check_names(files: TensorFiles, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise ValueError(
            f"{files.directory}: the checkpoint lacks {_some(missing)}; "
            "its files are incomplete or belong to another model"
        )
    if unexpected := sorted(found - expected):
        raise ValueError(
            f"{files.path(unexpected[0])}: config.json has no place for {_some(unexpected)}; "
            "the files belong to another model or another family"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"


def _assign(policy: nn.Module, name: str, value: Tensor) -> None:
    module_name, _, parameter = name.rpartition(".")
    setattr(policy.get_submodule(module_name), parameter, nn.Parameter(value))
