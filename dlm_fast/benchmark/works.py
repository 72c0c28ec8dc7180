"""Binds a provider to a head: the call that is timed, its check, its memory in a new process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dlm_fast.benchmark import memory, providers
from dlm_fast.benchmark.problem import Head, HeadSize, make_head
from dlm_fast.benchmark.providers import Delivered, Provider
from dlm_fast.benchmark.truth import Truth, errors

FLOP_PER_NDV = {
    "score": 2,
    "statistics": 2,
    "gradients": 6,
    "weighted_step": 6,
    "step": 6,
    "decode": 2,
}
"""work -> useful flop; a pass over the vocabulary that is repeated is not useful"""
ACCUMULATING = ("weighted_step", "step")

PLAIN = (
    providers.ours,
    providers.ours_later,
    providers.eager_gather_first,
    providers.eager_all_positions,
)


def plain_provider(name: str) -> Provider:
    """Ours and plain torch, by name."""
    return next(made for made in (make() for make in PLAIN) if made.name == name)


def bound(
    provider: Provider, work: str, head: Head, main_grad_VD: Tensor | None, temperature: float = 0
) -> Callable[[], Delivered]:
    """The call that is timed."""
    call = getattr(provider, work)
    if work in ACCUMULATING:
        return functools.partial(call, head, main_grad_VD)
    if work == "decode":
        return functools.partial(call, head, temperature)
    return functools.partial(call, head)


def checked(
    call: Callable[[], Delivered], truth: Truth, main_grad_VD: Tensor | None
) -> dict[str, float]:
    """One call and its errors; a buffer that takes gradients is emptied before and after."""
    if main_grad_VD is None:
        return errors(truth, call())
    main_grad_VD.zero_()
    found = errors(truth, call() | {"weight_grad": main_grad_VD})
    main_grad_VD.zero_()
    return found


def main_grad_of(head: Head, work: str) -> Tensor | None:
    """A float32 buffer whose pages exist, for works that add to one."""
    if work not in ACCUMULATING:
        return None
    return torch.zeros(head.weight.shape, device=head.weight.device)


def memory_calls(
    provider: Provider, work: str, size: Sequence[int], dtype: str, threads: int
) -> memory.Calls:
    """For ``memory.extra_bytes``: the work on a head of a few rows, then on the head asked for."""
    torch.set_num_threads(threads)
    few = HeadSize(16, 8, 64, 128)
    full = HeadSize(*size)

    def call(of: HeadSize) -> Callable[[], Iterable[Tensor]]:
        head = make_head(of, getattr(torch, dtype))
        work_on = bound(provider, work, head, main_grad_of(head, work))
        return lambda: work_on().values()

    measured = call(full)
    return (measured if provider.compiles else call(few)), measured


def plain_memory_calls(name: str, **arguments: object) -> memory.Calls:
    """``memory_calls`` of ours and plain torch."""
    return memory_calls(plain_provider(name), **arguments)  # type: ignore[arg-type]
