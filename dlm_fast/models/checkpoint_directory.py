"""A checkpoint directory, open and checked: everything but the weights themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dlm_fast.models.backbone import empty_backbone
from dlm_fast.models.family import Blueprint, Family, FamilyFormat
from dlm_fast.models.head import Head
from dlm_fast.models.policy import Policy
from dlm_fast.models.registry import format_of
from dlm_fast.models.safetensors_files import TensorFiles
from dlm_fast.models.source import Source, small_files
from dlm_fast.models.text import load_tokenizer
from dlm_fast.models.token_facts import Overrides, family_facts


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenCheckpoint:
    """A checkpoint whose tensors can be read."""

    policy: Policy
    """its parameters lie on the meta device"""
    files: TensorFiles
    parameter_of: dict[str, str]
    """name in the Policy of each tensor to read"""


@contextmanager
def open_checkpoint(directory: Path, overrides: Overrides) -> Iterator[OpenCheckpoint]:
    """Reads config, tokenizer and the headers of the weight files; ValueError where they are wrong
    or do not fit each other."""
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
        policy = empty_policy(blueprint, family, source, tokenizer)
        parameter_of = _match(policy, files, tensors)
        yield OpenCheckpoint(policy=policy, files=files, parameter_of=parameter_of)


def empty_policy(
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


def some_tensors(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"


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


def _match(policy: Policy, files: TensorFiles, tensors: set[str]) -> dict[str, str]:
    """A parameter for every tensor, a tensor for every parameter, of its shape."""
    # a tied head appears once among the parameters, under the embedding's name
    parameters = dict(policy.named_parameters())
    names = {policy.source.format.tensor_name(name): name for name in parameters}
    if policy.source.stores_tied_head:
        tensors = tensors - {policy.source.format.tensor_name(_HEAD)}
    if missing := sorted(set(names) - tensors):
        raise ValueError(
            f"{files.directory}: the checkpoint lacks {some_tensors(missing)}; "
            "its files are incomplete or belong to another model"
        )
    if unexpected := sorted(tensors - set(names)):
        raise ValueError(
            f"{files.path(unexpected[0])}: config.json has no place for "
            f"{some_tensors(unexpected)}; the files belong to another model or another family"
        )
    for tensor, name in names.items():
        shape = list(parameters[name].shape)
        if files.shape(tensor) != shape:
            raise ValueError(
                f"{files.path(tensor)}: tensor {tensor!r} has shape {files.shape(tensor)}, but "
                f"config.json asks for {shape}"
            )
    return names


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a checkpoint directory needs it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
