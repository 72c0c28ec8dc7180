"""Problems for attention under a visibility: random tensors, random intervals."""

import torch

from dlm_fast.ops.visibility import Visibility


def random_qkv(queries, keys, heads=4, key_heads=2, width=6, seed=0, dtype=torch.float64):
    """Queries, keys and values, leaves that require grad: the same numbers in every type."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, heads, width), (keys, key_heads, width), (keys, key_heads, width)
    numbers = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in numbers]


def values_and_gradients(attend, tensors):
    """Output and gradients of a random weighted sum of it."""
    out = attend(*tensors)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out))]


def exact(tensors):
    """The same numbers in float64, as new leaves on the CPU."""
    return [x.detach().cpu().double().requires_grad_() for x in tensors]


def assert_close(found, expected, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def free_intervals(queries, keys, seed, bounds=None):
    """Random disjoint interval pairs; some empty, some rows that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    low, high = bounds or (torch.zeros(keys, 1), torch.full((keys, 1), float(queries)))
    ends = low + torch.rand(keys, 4, generator=generator).sort(1).values * (high - low)
    return ends.floor().to(torch.int32)


def free_visibility(queries, keys, seed, lengths=()):
    """``free_intervals``, within segments if there are any."""
    bounds = None
    if lengths:
        end = torch.tensor(lengths).cumsum(0).float()
        start = end - torch.tensor(lengths)
        sizes = torch.tensor(lengths)
        bounds = tuple(b.repeat_interleave(sizes)[:, None] for b in (start, end))
    return Visibility(
        intervals=free_intervals(queries, keys, seed, bounds),
        position_ids=torch.zeros(queries, dtype=torch.int64),
        pred=torch.full((queries,), -1, dtype=torch.int32),
        lengths=lengths,
    )
