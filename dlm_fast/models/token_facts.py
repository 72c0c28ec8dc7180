"""Which tokens mask, end and pad: from the config files, the tokenizer and the caller's word."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlm_fast.models.family import Blueprint, Family, FamilyFormat
from dlm_fast.models.text import end_of_turn_id

logger = logging.getLogger(__name__)

_MOST_PADDING = 2**20
"""rows; matrices are padded by hundreds"""


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What a caller of ``load`` sets in place of what the checkpoint says."""

    mask_id: int | None = None
    eos_ids: Sequence[int] | None = None
    block_size: int | None = None
    max_length: int | None = None


def family_facts(
    config: dict[str, Any],
    generation_config: dict[str, Any],
    family_format: FamilyFormat,
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerBase | None,
    overrides: Overrides,
) -> Family:
    """The facts of a checkpoint, or a ValueError that names the key or the option to set."""
    mask_id = overrides.mask_id
    if mask_id is None and blueprint.needs_mask:
        mask_id = _mask_id(config, tokenizer)
    eos_ids = _eos_ids(config, generation_config, blueprint, tokenizer, overrides)
    pad_id = config.get("pad_token_id")
    if pad_id is None and tokenizer is not None:
        pad_id = tokenizer.pad_token_id
    for name, ids in (("mask_id", [mask_id]), ("eos_ids", eos_ids), ("pad_token_id", [pad_id])):
        for token in ids:
            if token is not None and not (type(token) is int and 0 <= token < blueprint.head_rows):
                raise ValueError(
                    f"{name} {token!r} is no token of the vocabulary of {blueprint.head_rows}"
                )
    max_length = overrides.max_length
    if max_length is not None and not (type(max_length) is int and max_length > 0):
        raise ValueError(f"max_length must be a positive integer, got {max_length!r}")
    return Family(
        model_type=family_format.model_type,
        kind=blueprint.kind,
        logit_shift=blueprint.logit_shift,
        vocab_size=blueprint.head_rows,
        mask_id=mask_id,
        eos_ids=tuple(eos_ids),
        pad_id=pad_id,
        block_size=_block_size(blueprint, overrides),
        max_length=blueprint.max_length if max_length is None else max_length,
        unused_ids=_unused_ids(blueprint, tokenizer, mask_id),
    )


def _mask_id(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> int:
    of_tokenizer = None if tokenizer is None else tokenizer.mask_token_id
    mask_id = config.get("mask_token_id")
    if mask_id is None:
        mask_id = of_tokenizer
    elif of_tokenizer is not None and of_tokenizer != mask_id:
        logger.warning(
            "config.json says mask_token_id %s, the tokenizer %s; the config's is taken, "
            "mask_id=... of load sets another",
            mask_id,
            of_tokenizer,
        )
    if mask_id is None:
        raise ValueError(
            "neither config.json (mask_token_id) nor the tokenizer names the mask token, which a "
            "diffusion model needs; pass mask_id=... to load"
        )
    return mask_id


def _eos_ids(
    config: dict[str, Any],
    generation_config: dict[str, Any],
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerBase | None,
    overrides: Overrides,
) -> list[Any]:
    """All tokens that anything of the checkpoint calls the end, the end of a chat turn too."""
    if overrides.eos_ids is not None:
        return list(dict.fromkeys(overrides.eos_ids))
    found = [config.get("eos_token_id"), generation_config.get("eos_token_id")]
    if tokenizer is not None:
        turn = end_of_turn_id(tokenizer)
        # found, not declared: a model without that token does not end turns by it
        known_turn = turn if turn is not None and turn < blueprint.head_rows else None
        found += [tokenizer.eos_token_id, known_turn]
    every = [i for ids in found for i in (ids if isinstance(ids, list) else [ids])]
    # not a set: what is no number is named by the check that follows
    return [i for n, i in enumerate(every) if i is not None and i not in every[:n]]


def _block_size(blueprint: Blueprint, overrides: Overrides) -> int | None:
    given = overrides.block_size
    if blueprint.kind != "block":
        if given is not None:
            raise ValueError(
                f"block_size={given} was given, but this model's attention is {blueprint.kind!r}; "
                "only block-causal models have blocks of their own"
            )
        return None
    if given is None:
        given = blueprint.block_size
    if given is None:
        raise ValueError(
            "config.json does not say the model's block_size; pass block_size=... to load, the "
            "number that the model was trained with"
        )
    if type(given) is not int or given < 1:
        raise ValueError(f"block_size must be a positive integer, got {given!r}")
    return given


def _unused_ids(
    blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase | None, mask_id: int | None
) -> tuple[int, ...]:
    if tokenizer is None:
        return ()
    used = set(tokenizer.get_vocab().values())
    if blueprint.head_rows > len(used) + _MOST_PADDING:
        raise ValueError(
            f"config.json asks for a vocabulary of {blueprint.head_rows}, but the tokenizer has "
            f"{len(used)} tokens: they belong to different models"
        )
    if beyond := sum(token >= blueprint.head_rows for token in used):
        logger.warning(
            "%d tokens of the tokenizer have ids beyond the model's vocabulary of %d; text that "
            "needs them is refused",
            beyond,
            blueprint.head_rows,
        )
    # a mask token that the caller chose may be a padding row
    return tuple(i for i in range(blueprint.head_rows) if i not in used and i != mask_id)
