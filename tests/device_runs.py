"""Runs an op on the emulator or on a CUDA device: CPU tensors in, CPU tensors out.

New tensors are poisoned (NaN, the largest integer, True), so that an output left unwritten shows.
Checks take such a ``run`` and serve both ``tests/emulation`` and ``tests/cuda``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dlm_fast.ops import Rng
from dlm_fast.ops._executor import emulated

Run = Callable[..., Any]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, ``torch.empty`` fills what it allocates."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def on_emulator(order: str, seed: int = 7) -> Run:
    def run(op: Callable, *args: Any, **options: Any) -> Any:
        with emulated(order, seed), poisoned():
            return op(*args, **options)

    return run


def on_device(device: torch.device) -> Run:
    def move(tree: Any, to: torch.device | str) -> Any:
        return tree_map(lambda leaf: leaf.to(to) if isinstance(leaf, Tensor | Rng) else leaf, tree)

    def run(op: Callable, *args: Any, **options: Any) -> Any:
        args, options = move((args, options), device)
        with poisoned():
            result = op(*args, **options)
        return move(result, "cpu")

    return run
