"""Checks what a caller hands to ``sample`` and turns it into token tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.unmask import UnmaskRule

_ID_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def check_family(policy: Any, config: SamplerConfig, for_trees: bool = False) -> None:
    """A diffusion model needs a mask token, a block model its own blocks; a causal one has neither
    steps nor rules."""
    family = policy.family
    bad = [i for i in config.forbid_ids if i >= family.vocab_size]
    if bad:
        raise ValueError(
            f"rollout.forbid_ids {bad} lie outside the vocabulary of {family.vocab_size} tokens"
        )
    if family.kind == "causal":
        _check_causal_family(family, config)
        return
    if for_trees:
        _check_tree_family(family, config)
    elif config.cache == "tree" and family.kind != "block":
        raise ValueError(
            f"rollout.cache=tree keeps the keys of paths that share their beginnings; model family "
            f"{family.model_type!r} sees the whole sequence: set rollout.cache to none (exact), "
            "prefix or dual (approximate)"
        )
    if family.mask_id is None:
        raise ValueError(
            f"model family {family.model_type!r} has no mask id, so nothing can be denoised; give "
            f"one when loading the model (mask_id=...)"
        )
    if family.kind == "block" and config.block_size != family.block_size:
        raise ValueError(
            f"rollout.block_size={config.block_size} differs from the model's own blocks of "
            f"{family.block_size}; set rollout.block_size={family.block_size}"
        )
    if config.cache == "block" and family.kind != "block":
        raise ValueError(
            f"rollout.cache=block keeps finished blocks, which needs a block model; model family "
            f"{family.model_type!r} sees the whole sequence at every position: set rollout.cache "
            "to none (exact), prefix or dual (approximate)"
        )
    if config.cache in ("prefix", "dual") and family.kind != "full":
        raise ValueError(
            f"rollout.cache={config.cache} approximates models that see the whole sequence; model "
            f"family {family.model_type!r} works in blocks: set rollout.cache=block (exact)"
        )


def _check_causal_family(family: Any, config: SamplerConfig) -> None:
    name = f"model family {family.model_type!r} is causal: it decodes token after token, so"
    if family.logit_shift != 1:
        raise ValueError(
            f"{name} row i - 1 has to predict token i; its logit_shift is {family.logit_shift}"
        )
    for option, value, default in (
        ("rule", config.rule, ("top_k", "sequential")),
        ("confidence", config.confidence, ("probability",)),
        ("forbid_eos_confidence", config.forbid_eos_confidence, (False,)),
        ("cache", config.cache, ("none", "tree")),
    ):
        if value not in default:
            raise ValueError(
                f"{name} rollout.{option}={value} has no meaning; set it to "
                f"{' or '.join(map(str, default))}"
            )


def _check_tree_family(family: Any, config: SamplerConfig) -> None:
    if family.kind == "full":
        raise ValueError(
            f"model family {family.model_type!r} sees the whole sequence, so paths that part share "
            "no keys: trees grow on causal and block models"
        )
    if config.cache not in ("none", "tree"):
        raise ValueError(
            f"rollout.cache={config.cache} keeps the keys of single rows; trees take none or tree"
        )
    if family.logit_shift:
        raise ValueError(
            f"trees of block models take a logit shift of 0; model family {family.model_type!r} "
            f"has {family.logit_shift}, so a block's first token would need the row before it"
        )


def check_causal(fixed_ids: object, rule: object) -> None:
    """What ``sample`` takes for the denoising loop alone."""
    for name, given in (("fixed_ids", fixed_ids), ("rule", rule)):
        if given is not None:
            raise ValueError(
                f"{name} belongs to the denoising loop; a causal model decodes token after token: "
                "leave it out"
            )


def check_max_batch(max_batch: int | None) -> None:
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")


def check_rule(rule: UnmaskRule, config: SamplerConfig) -> None:
    """A rule that looks at the whole window needs all of it in every forward."""
    if rule.whole_window and config.cache != "none":
        raise ValueError(
            f"the unmasking rule asks for the whole window, but rollout.cache={config.cache} "
            "forwards the current block only; set rollout.cache=none"
        )


def check_prompts(
    policy: Any, prompts: Sequence[Tensor | str], max_new_tokens: int | None
) -> list[Tensor]:
    """int64 [P] on the CPU for every prompt, which with ``max_new_tokens`` fits the model; None:
    that is not looked at."""
    if isinstance(prompts, (str, Tensor)):
        raise TypeError(
            f"prompts must be a list of texts or id tensors, got one {type(prompts).__name__}; "
            f"write sample(policy, [prompt], ...)"
        )
    if len(prompts) == 0:
        raise ValueError("prompts is empty: sample needs at least one prompt")
    return [_check_prompt(policy, index, p, max_new_tokens) for index, p in enumerate(prompts)]


def _check_prompt(policy: Any, index: int, prompt: Tensor | str, new: int | None) -> Tensor:
    if isinstance(prompt, str):
        prompt = policy.encode(prompt)
    if not isinstance(prompt, Tensor):
        raise TypeError(
            f"prompt {index} must be a text or an id tensor, got {type(prompt).__name__}"
        )
    if prompt.dtype not in _ID_TYPES or prompt.dim() != 1:
        raise ValueError(
            f"prompt {index} must be integer ids of shape [P], "
            f"got {prompt.dtype} of shape {list(prompt.shape)}"
        )
    ids_P = prompt.detach().to("cpu", torch.int64)
    if ids_P.numel() == 0:
        raise ValueError(f"prompt {index} is empty; every rollout needs at least one prompt token")
    _check_range(policy, f"prompt {index}", ids_P)
    if policy.family.mask_id is not None and bool((ids_P == policy.family.mask_id).any()):
        raise ValueError(
            f"prompt {index} contains the mask id {policy.family.mask_id}; "
            f"masked positions to be filled belong in fixed_ids, not in the prompt"
        )
    limit = policy.family.max_length
    if limit is not None and new is not None and ids_P.numel() + new > limit:
        raise ValueError(
            f"prompt {index} of {ids_P.numel()} tokens plus {new} new ones "
            f"exceeds the model's {limit}; shorten the prompt or rollout.max_new_tokens (or load "
            "the model with a larger max_length)"
        )
    return ids_P


def _check_range(policy: Any, name: str, ids: Tensor) -> None:
    vocabulary = policy.family.vocab_size
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.numel():
        raise ValueError(
            f"{name} contains id {int(wrong[0])}, outside the vocabulary of {vocabulary} tokens"
        )


def check_fixed(
    policy: Any, fixed_ids: Sequence[Tensor | None] | None, num_rows: int, config: SamplerConfig
) -> Tensor | None:
    """int64 [R, W] on the CPU, the mask id where free; None if nothing is given."""
    if fixed_ids is None:
        return None
    if config.stop_at_eos and policy.family.kind != "block":
        raise ValueError(
            "rollout.stop_at_eos leaves out what was given behind the end of text, but family "
            f"{policy.family.model_type!r} saw it at every step; set rollout.stop_at_eos=false"
        )
    if len(fixed_ids) != num_rows:
        raise ValueError(f"fixed_ids has {len(fixed_ids)} entries for {num_rows} prompts")
    width = config.max_new_tokens
    fixed_RW = torch.full((num_rows, width), policy.family.mask_id)
    for index, given in enumerate(fixed_ids):
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.dtype not in _ID_TYPES or given.shape != (width,):
            got = (
                f"{given.dtype} of shape {list(given.shape)}"
                if isinstance(given, Tensor)
                else type(given).__name__
            )
            raise ValueError(
                f"fixed_ids[{index}] must be integer ids of shape "
                f"[rollout.max_new_tokens={width}], the mask id where free, got {got}"
            )
        fixed_RW[index] = given.detach().to("cpu", torch.int64)
        _check_range(policy, f"fixed_ids[{index}]", fixed_RW[index])
    return fixed_RW


def check_sequence_ids(sequence_ids: Sequence[int] | Tensor | None, num_rows: int) -> list[int]:
    """One id a row, 0, 1, 2, ... by default. Equal ids mean equal random numbers, which is
    allowed."""
    if sequence_ids is None:
        return list(range(num_rows))
    ids = sequence_ids.tolist() if isinstance(sequence_ids, Tensor) else list(sequence_ids)
    if len(ids) != num_rows:
        raise ValueError(f"sequence_ids has {len(ids)} entries for {num_rows} prompts")
    bad = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]
    if bad:
        raise ValueError(f"sequence_ids must be integers from 0 on, got {bad[:3]}")
    return ids
