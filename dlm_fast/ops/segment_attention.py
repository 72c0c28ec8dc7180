"""Attention of a policy under a visibility: our kernel, or torch's where that is faster.

T packed rows, B sequences of S rows each, H query heads, G key heads, d head width, b segments of
one length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_fast.ops.interval_attention import interval_attention
from dlm_fast.ops.visibility import SegmentBucket, Visibility

FEW_NUMBERS = 3072
"""rows of a segment times head width, below which torch's batched float32 call is faster than tiles
that segments share: docs/kernels/interval_attention.md has the table"""


def segment_attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    visibility: Visibility,
    scale: float | None = None,
) -> Tensor:
    """``interval_attention`` in a policy's layout: [B, H, S, d].

    [B, S] in row-major order are the rows of the pack, whatever the segments are. On the CPU the
    fused kernel runs, but for small sequences of one length that see all of themselves; on CUDA
    torch's own kernels, segment length by segment length, or FlexAttention where a pattern has no
    segments.
    """
    dense = _small_and_whole(q_BHSd, visibility) if q_BHSd.is_cpu else bool(visibility.buckets)
    if dense:
        return bucket_attention(q_BHSd, k_BGSd, v_BGSd, visibility, scale)
    q_THd, k_TGd, v_TGd = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSd, k_BGSd, v_BGSd))
    out_THd = interval_attention(q_THd, k_TGd, v_TGd, visibility, scale)
    return out_THd.view(q_BHSd.shape[0], q_BHSd.shape[2], *out_THd.shape[1:]).transpose(1, 2)


def _small_and_whole(q_BHSd: Tensor, visibility: Visibility) -> bool:
    lengths = visibility.lengths
    # buckets hold a mask for every length: not to be asked for in vain
    if len(set(lengths)) != 1 or q_BHSd.dtype in (torch.bfloat16, torch.float16):
        return False
    if not 0 < lengths[0] * q_BHSd.shape[-1] < FEW_NUMBERS:
        return False
    return visibility.buckets[0].mask is None


def bucket_attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    visibility: Visibility,
    scale: float | None = None,
) -> Tensor:
    """The same by torch's batched dense attention: one call per segment length.

    Without segments one dense mask over all rows is used.
    """
    buckets = visibility.buckets
    if len(buckets) == 1:
        bucket = buckets[0]
        shape = (len(bucket.members), bucket.length)
        q, k, v = (_fold(x, shape) for x in (q_BHSd, k_BGSd, v_BGSd))
        return _fold(_attend(q, k, v, bucket, scale), (q_BHSd.shape[0], q_BHSd.shape[2]))
    q, k, v = (_fold(x, (1, x.shape[0] * x.shape[2])) for x in (q_BHSd, k_BGSd, v_BGSd))
    if not buckets:
        mask = visibility.dense()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    else:
        out = _attend_ragged(q[0], k[0], v[0], visibility, scale)
    return _fold(out, (q_BHSd.shape[0], q_BHSd.shape[2]))


def _fold(x_BHSd: Tensor, shape: tuple[int, int]) -> Tensor:
    """The same rows as [b, H, s, d] with (b, s) = shape."""
    if (x_BHSd.shape[0], x_BHSd.shape[2]) == shape:
        return x_BHSd
    rows = x_BHSd.transpose(1, 2)
    return rows.reshape(*shape, *rows.shape[2:]).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bucket: SegmentBucket, scale: float | None) -> Tensor:
    mask = None if bucket.is_causal else bucket.mask
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=bucket.is_causal, scale=scale, enable_gqa=True
    )


def _attend_ragged(
    q_HTd: Tensor, k_GTd: Tensor, v_GTd: Tensor, visibility: Visibility, scale: float | None
) -> Tensor:
    # split and stack, not an index: their gradients are one concatenation, not a scatter
    segments = [x.split(visibility.lengths, dim=1) for x in (q_HTd, k_GTd, v_GTd)]
    out: list[Tensor] = [segments[0][0][:, :0]] * len(visibility.lengths)
    for bucket in visibility.buckets:
        q, k, v = (torch.stack([s[m] for m in bucket.members]) for s in segments)
        attended = _attend(q, k, v, bucket, scale).unbind(0)
        for member, rows_HSd in zip(bucket.members, attended, strict=True):
            out[member] = rows_HSd
    return torch.cat(out, dim=1)[None]
