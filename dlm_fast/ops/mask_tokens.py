"""Masked copies of sequences: the Monte-Carlo samples of the ELBO, packed and ready for a forward.

The samplers, their weights and the layout of their random numbers: ``dlm_fast.ops.mask_samplers``.
Shapes: R sequences, S tokens of a sequence, T all tokens, N masked tokens of all copies.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, check_dtype, extension, num_threads
from dlm_fast.ops._device import check_device
from dlm_fast.ops._executor import executor_of
from dlm_fast.ops.mask_samplers import (
    MIN_T,
    PAIRED,
    SAMPLERS,
    gauss_legendre,
    mask_counts_ref,
    token_keys_ref,
)
from dlm_fast.ops.philox import Rng


class Masked(NamedTuple):
    """Copies packed by sequence, then by sample: for every r, for every j, the S_r tokens."""

    noisy_ids: Tensor
    """int64 [count * T], the mask id where masked"""
    rows: Tensor
    """int32 [N], packed row of every masked token, ascending"""
    targets: Tensor
    """int64 [N], the token behind the mask"""
    counts: Tensor
    """int32 [R, count], masked tokens of each copy; on the CPU"""
    weights: Tensor
    """float32 [R, count], w in ell = w * sum of log-probabilities; on the CPU"""


def mask_tokens(
    token_ids: Tensor,
    maskable: Tensor,
    mask_id: int,
    *,
    sampler: str,
    num_samples: int,
    first: int = 0,
    count: int | None = None,
    rng: Rng,
    lengths: Sequence[int] | None = None,
) -> Masked:
    """Draws masks and applies them: per sequence the samples ``first .. first+count`` of n.

    The mean of ``weights[r, j] * (sum of log-probabilities of the masked tokens)`` over all
    ``num_samples`` estimates the ELBO of sequence r. A mask depends on the key of its sequence, on
    the number of maskable tokens and on its own index only: splitting the samples or the batch, and
    padding, change nothing.

    Ids, rows and targets stay on the device of ``token_ids``; how many tokens each copy masks is
    decided on the CPU, so that the caller knows the sizes. On a CUDA device this takes one wait,
    for the numbers of maskable tokens and for the keys if they lie there; no other value is read.

    Args:
        token_ids: int64 [R, S], or flat [T] with ``lengths``.
        maskable: bool of the same shape; prompt and padding are False.
        mask_id: the mask token; no maskable token may be it.
        sampler: one of ``SAMPLERS``.
        num_samples: n; even for the coupled samplers, whose samples 2p and 2p+1 are complements.
        first: first sample to make.
        count: number of samples to make; default: all from ``first`` on.
        rng: one key per sequence, on the CPU or with the tokens, without position and step;
            ``draw`` names repeats.
        lengths: tokens of each sequence of a flat batch.
    """
    start, count = _check(
        token_ids, maskable, mask_id, sampler, num_samples, first, count, rng, lengths
    )
    keys, num_maskable = _known_on_host(token_ids, maskable, mask_id, start, rng)
    token_ids, maskable = token_ids.reshape(-1), maskable.reshape(-1)
    samples = [num_samples, first, count, rng.draw]
    counts, weights = _mask_counts(
        keys,
        num_maskable,
        SAMPLERS.index(sampler),
        samples,
        _quadrature(sampler, num_samples),
    )
    noisy_ids, rows, targets = _mask_fill(
        token_ids,
        maskable,
        start,
        rng.keys,
        counts,
        mask_id,
        sampler in PAIRED,
        samples,
        int(counts.sum()),
    )
    return Masked(noisy_ids, rows, targets, counts, weights)


def mask_tokens_ref(
    token_ids: Tensor,
    maskable: Tensor,
    mask_id: int,
    *,
    sampler: str,
    num_samples: int,
    first: int = 0,
    count: int | None = None,
    rng: Rng,
    lengths: Sequence[int] | None = None,
) -> Masked:
    """The definition. Every backend must match it."""
    start, count = _check(
        token_ids, maskable, mask_id, sampler, num_samples, first, count, rng, lengths
    )
    keys, known = _known_on_host(token_ids, maskable, mask_id, start, rng)
    token_ids, maskable, num_maskable = token_ids.reshape(-1), maskable.reshape(-1), known.tolist()
    counts, weights = mask_counts_ref(
        sampler, num_samples, first, count, keys, rng.draw, num_maskable
    )
    noisy, rows, targets, packed = [], [], [], 0
    for r, key in enumerate(keys.tolist()):
        ids_S = token_ids[start[r] : start[r + 1]]
        open_L = maskable[start[r] : start[r + 1]].nonzero()[:, 0]
        for j in range(count):
            sample, complement = divmod(first + j, 2) if sampler in PAIRED else (first + j, 0)
            token_key = token_keys_ref(key, sample, rng.draw, num_maskable[r])
            order = sorted(range(num_maskable[r]), key=token_key.__getitem__)
            cut = num_maskable[r] - int(counts[r, j]) if complement else int(counts[r, j])
            chosen = open_L[sorted(order[cut:] if complement else order[:cut])]
            noisy.append(ids_S.index_fill(0, chosen, mask_id))
            rows.append(chosen + packed)
            targets.append(ids_S[chosen])
            packed += ids_S.numel()
    empty = token_ids[:0]
    return Masked(
        torch.cat([empty, *noisy]),
        torch.cat([empty, *rows]).to(torch.int32),
        torch.cat([empty, *targets]),
        counts,
        weights,
    )


@torch.library.custom_op("dlm_fast::mask_counts", mutates_args=(), device_types="cpu")
def _mask_counts(
    keys: Tensor, num_maskable: Tensor, sampler: int, samples: list[int], quadrature: Tensor
) -> tuple[Tensor, Tensor]:
    num_samples, first, count, draw = samples
    counts = torch.empty(keys.numel(), count, dtype=torch.int32)
    weights = torch.empty(keys.numel(), count, dtype=torch.float32)
    keys, num_maskable = keys.contiguous(), num_maskable.contiguous()
    quadrature = quadrature.contiguous()
    extension().mask_counts_cpu(
        keys.numel(),
        num_samples,
        first,
        count,
        draw,
        SAMPLERS[sampler] in PAIRED,
        sampler,
        MIN_T,
        *addresses(keys, num_maskable, quadrature, counts, weights),
        num_threads(),
    )
    return counts, weights


@_mask_counts.register_fake
def _(
    keys: Tensor, num_maskable: Tensor, sampler: int, samples: list[int], quadrature: Tensor
) -> tuple[Tensor, Tensor]:
    shape = (keys.shape[0], samples[2])
    return torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.float32)


@torch.library.custom_op("dlm_fast::mask_fill", mutates_args=(), device_types=("cpu", "cuda"))
def _mask_fill(
    token_ids: Tensor,
    maskable: Tensor,
    start: Tensor,
    keys: Tensor,
    counts: Tensor,
    mask_id: int,
    paired: bool,
    samples: list[int],
    num_masked: int,
) -> tuple[Tensor, Tensor, Tensor]:
    count, device = samples[2], token_ids.device
    noisy_ids = torch.empty(token_ids.numel() * count, dtype=torch.int64, device=device)
    rows = torch.empty(num_masked, dtype=torch.int32, device=device)
    targets = torch.empty(num_masked, dtype=torch.int64, device=device)
    tokens = (token_ids.contiguous(), maskable.contiguous())
    outputs, shape = (noisy_ids, rows, targets), (keys.numel(), *samples, paired, mask_id)
    executor = executor_of(device)
    if executor is None:
        on_cpu = (keys.contiguous(), start.contiguous(), *tokens, counts.contiguous())
        inputs = addresses(*on_cpu)
        extension().mask_fill_cpu(*shape, num_masked, *inputs, *addresses(*outputs), num_threads())
        return outputs
    first_row = torch.nn.functional.pad(counts.reshape(-1).cumsum(0), (1, 0))
    if first_row[-1] != num_masked:
        raise ValueError("mask_tokens: num_masked must be the sum of counts")
    if keys.numel():
        moved = [t.to(device).contiguous() for t in (keys, start, first_row)]
        inputs = addresses(*moved, *tokens)
        plan = extension().plan_mask_fill(*shape, inputs, addresses(*outputs))
        executor.launch(plan, device)
    return outputs


@_mask_fill.register_fake
def _(
    token_ids: Tensor,
    maskable: Tensor,
    start: Tensor,
    keys: Tensor,
    counts: Tensor,
    mask_id: int,
    paired: bool,
    samples: list[int],
    num_masked: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        token_ids.new_empty(token_ids.shape[0] * samples[2]),
        token_ids.new_empty(num_masked, dtype=torch.int32),
        token_ids.new_empty(num_masked),
    )


def _known_on_host(
    token_ids: Tensor, maskable: Tensor, mask_id: int, start: Tensor, rng: Rng
) -> tuple[Tensor, Tensor]:
    """Keys and numbers of maskable tokens, int64 [R]: the one place that waits for a device."""
    device, sequences = token_ids.device, len(rng)
    before = torch.nn.functional.pad(maskable.reshape(-1).cumsum(0), (1, 0))
    bounds = before[start.to(device)]
    masked_already = (token_ids == mask_id) & maskable
    facts = [bounds[1:] - bounds[:-1], masked_already.any()[None].to(torch.int64)]
    known = torch.cat([*facts, rng.keys.to(device)]).cpu()
    num_maskable, any_masked_already, keys = known.split([sequences, 1, sequences])
    if any_masked_already:
        place = masked_already.nonzero()[0].tolist()
        raise ValueError(
            f"mask_tokens: token_ids{place} is mask_id={mask_id} and maskable, but a token that is "
            "masked already has no target; make it not maskable"
        )
    return keys, num_maskable


def _quadrature(sampler: str, num_samples: int) -> Tensor:
    """float64 [2, n], nodes and weights; empty for the other samplers."""
    if sampler != "quad_t":
        return torch.empty(2, 0, dtype=torch.float64)
    return torch.tensor(gauss_legendre(num_samples), dtype=torch.float64)


def _check(
    token_ids: Tensor,
    maskable: Tensor,
    mask_id: int,
    sampler: str,
    num_samples: int,
    first: int,
    count: int | None,
    rng: Rng,
    lengths: Sequence[int] | None,
) -> tuple[Tensor, int]:
    """Start of every sequence, int64 [R+1], and the number of samples to make."""
    if sampler not in SAMPLERS:
        close = difflib.get_close_matches(str(sampler), SAMPLERS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"mask_tokens: sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}{hint}"
        )
    if operator.index(num_samples) < 1:
        raise ValueError(f"mask_tokens: num_samples must be at least 1, got {num_samples}")
    if sampler in PAIRED and num_samples % 2:
        raise ValueError(
            f"mask_tokens: sampler {sampler!r} draws pairs, so num_samples must be even, "
            f"got {num_samples}; take {num_samples + 1}"
        )
    count = num_samples - first if count is None else operator.index(count)
    if first < 0 or count < 1 or first + count > num_samples:
        raise ValueError(
            f"mask_tokens: samples first={first} .. first+count={first + count} must be at least "
            f"one and lie in 0..{num_samples}"
        )
    start = _start_of_sequences(token_ids, maskable, lengths)
    if len(rng) != start.numel() - 1:
        raise ValueError(
            f"mask_tokens: rng must have one key per sequence, got {len(rng)} for "
            f"{start.numel() - 1} sequences"
        )
    if rng.position is not None or rng.step is not None:
        raise ValueError(
            "mask_tokens: rng must not carry position or step, which the masks count themselves; "
            "use rng.draw or another seed for fresh masks"
        )
    check_device("mask_tokens", token_ids=token_ids, maskable=maskable)
    if not rng.keys.is_cpu:
        check_device("mask_tokens", token_ids=token_ids, rng=rng.keys)
    if token_ids.numel() * count >= 2**31:
        raise ValueError(
            f"mask_tokens: {token_ids.numel()} tokens in {count} copies exceed the 2^31-1 rows "
            "of an int32 index; make fewer samples per call"
        )
    return start, count


def _start_of_sequences(
    token_ids: Tensor, maskable: Tensor, lengths: Sequence[int] | None
) -> Tensor:
    check_dtype("mask_tokens", "token_ids", token_ids, torch.int64)
    check_dtype("mask_tokens", "maskable", maskable, torch.bool)
    if token_ids.shape != maskable.shape:
        raise ValueError(
            f"mask_tokens: maskable must have the shape {list(token_ids.shape)} of token_ids, "
            f"got {list(maskable.shape)}"
        )
    if token_ids.dim() == 2 and lengths is None:
        rows, size = token_ids.shape
        return torch.arange(rows + 1, dtype=torch.int64) * size
    if token_ids.dim() != 1 or lengths is None:
        raise ValueError(
            "mask_tokens: token_ids must be [R, S], or flat [T] with lengths, got shape "
            f"{list(token_ids.shape)} {'without' if lengths is None else 'with'} lengths"
        )
    length_R = torch.tensor([operator.index(n) for n in lengths], dtype=torch.int64)
    if bool((length_R < 0).any()) or int(length_R.sum()) != token_ids.numel():
        raise ValueError(
            f"mask_tokens: lengths must not be negative and must sum to the {token_ids.numel()} "
            f"tokens, got sum {int(length_R.sum())}"
        )
    return torch.nn.functional.pad(length_R.cumsum(0), (1, 0))
