"""What a checkpoint is, in words: read from its config, tokenizer and file headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlm_fast.models.checkpoint_directory import open_checkpoint
from dlm_fast.models.family import Family
from dlm_fast.models.load import load
from dlm_fast.models.policy import Policy
from dlm_fast.models.token_facts import Overrides


def summarise(path: str | Path, **overrides: Any) -> dict[str, str]:
    """Facts by name; every check of ``load`` but those that need the weights themselves.

    ``overrides``: ``mask_id``, ``eos_ids``, ``block_size``, ``max_length`` as for ``load``.
    """
    if str(path) == "tiny":
        policy = load("tiny", **overrides)
        return _facts(policy) | {"files": "none: made on the spot"}
    with open_checkpoint(Path(path), Overrides(**overrides)) as checkpoint:
        names = sorted(set(checkpoint.files.file_of.values()))
        types = Counter(
            str(t).removeprefix("torch.") for t in checkpoint.policy.source.dtypes.values()
        )
        files = f"{names[0]}" if len(names) == 1 else f"{len(names)} files, {names[0]} and on"
        return _facts(checkpoint.policy) | {"files": f"{files}, {', '.join(sorted(types))}"}


def _facts(policy: Policy) -> dict[str, str]:
    family, tokenizer = policy.family, policy.tokenizer
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    tied = ", the head is the embedding" if policy.source.tied_head else ""
    return {
        "family": family.model_type,
        "backbone": type(policy.backbone).__name__,
        "attention": _attention(family),
        "predicted by": "the row before" if family.logit_shift else "the token's own row",
        "parameters": f"{parameters:,}{tied}",
        "memory of weights": f"{4 * parameters / 1e9:.3g} GB in float32, "
        f"{2 * parameters / 1e9:.3g} GB in bfloat16",
        "vocabulary": f"{family.vocab_size} rows, {len(family.unused_ids)} without a token",
        "mask token": _tokens(tokenizer, [] if family.mask_id is None else [family.mask_id]),
        "end tokens": _tokens(tokenizer, family.eos_ids),
        "longest sequence": str(family.max_length or "not said"),
        "tokenizer": "none: token ids only" if tokenizer is None else type(tokenizer).__name__,
        "chat template": "yes" if tokenizer is not None and tokenizer.chat_template else "none",
    }


def _attention(family: Family) -> str:
    if family.kind == "block":
        return f"block-causal, blocks of {family.block_size}"
    return {"full": "full", "causal": "causal"}[family.kind]


def _tokens(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    if not ids:
        return "none"
    if tokenizer is None:
        return ", ".join(map(str, ids))
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)}" for i in ids)
