"""Keyed random numbers: numbers that have names, not an order of calls.

Nothing here has a state. A number is named by its key and its counter, so it is the same alone or
in a batch, on any rank, in any order of calls, in C++, CUDA and torch:

    key      mix64(seed, stream, sequence id)                     one per row
    counter  (column >> 2, position, step, draw), word column & 3   column: vocabulary index
    uniform  u = ((word >> 9) + 1/2) / 2^23                        exact in float32, 0 < u < 1

Source of the generator: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011. Shapes: R rows, C columns.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from dlm_fast.ops._common import addresses, check_dtype, extension, num_threads, refuse_cuda

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """What a random number decides; streams of one sequence never share numbers."""

    TOKEN = 0
    MASK = 1
    UNMASK = 2
    DATA = 3
    POLICY = 4
    ROUNDING = 5
    TREE = 6


def _finalise(x: int) -> int:
    """The output function of SplitMix64: a bijection in which every bit reaches every bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _absorb(state: int, number: int) -> int:
    number = operator.index(number)
    if not -(1 << 63) <= number < (1 << 64):
        raise ValueError(f"mix64: {number} does not fit 64 bits; hash it first")
    return _finalise(((state + _GOLDEN64) & _MASK64) ^ (number & _MASK64))


def mix64(*numbers: int) -> int:
    """Hashes integers, whose order matters, into [0, 2^63): the key of a random stream."""
    state = _finalise(len(numbers))
    for number in numbers:
        state = _absorb(state, number)
    return state >> 1


def _mix64_last(prefix: tuple[int, ...], last_R: np.ndarray) -> np.ndarray:
    """``mix64(*prefix, i)`` for every ``i`` of an int64 array."""
    state = _finalise(len(prefix) + 1)
    for number in prefix:
        state = _absorb(state, number)
    x = np.uint64((state + _GOLDEN64) & _MASK64) ^ last_R.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class Rng:
    """The name of the random numbers of R rows; see the module's text."""

    keys: Tensor
    """int64 [R]"""
    position: Tensor | None = None
    """int32 [R], second counter; None: zeros"""
    step: Tensor | None = None
    """int32 [R], third counter; None: zeros"""
    draw: int = 0
    """fourth counter, below 2^32"""

    def __post_init__(self) -> None:
        check_dtype("Rng", "keys", self.keys, torch.int64)
        if self.keys.dim() != 1:
            raise ValueError(
                f"Rng: keys must have one dimension, got shape {list(self.keys.shape)}"
            )
        for name in ("position", "step"):
            counter = getattr(self, name)
            if counter is None:
                continue
            check_dtype("Rng", name, counter, torch.int32)
            if counter.shape != self.keys.shape:
                raise ValueError(
                    f"Rng: {name} must have the shape {list(self.keys.shape)} of keys, "
                    f"got {list(counter.shape)}"
                )
            if counter.device != self.keys.device:
                raise ValueError(
                    f"Rng: {name} lies on {counter.device} but keys on {self.keys.device}; "
                    "move both to one device"
                )
        if not 0 <= self.draw <= _MASK32:
            raise ValueError(f"Rng: draw must lie in 0..2^32-1, got {self.draw}")

    @staticmethod
    def of(seed: int, stream: Stream, sequence_ids: Tensor | Sequence[int]) -> Rng:
        """One row per sequence: ``keys = mix64(seed, stream, id)``, on the device of the ids.

        Keys are made on the CPU: ids on another device are waited for. In a loop, make the keys
        once and ``take`` rows of them.
        """
        prefix = (seed, int(Stream(stream)))
        if isinstance(sequence_ids, Tensor):
            check_dtype("Rng.of", "sequence_ids", sequence_ids, torch.int64, torch.int32)
            keys = _mix64_last(prefix, sequence_ids.detach().cpu().to(torch.int64).numpy())
            return Rng(torch.from_numpy(keys).to(sequence_ids.device))
        ids = [operator.index(i) for i in sequence_ids]
        if any(not -(1 << 63) <= i < (1 << 63) for i in ids):
            return Rng(torch.tensor([mix64(*prefix, i) for i in ids], dtype=torch.int64))
        return Rng(torch.from_numpy(_mix64_last(prefix, np.array(ids, dtype=np.int64))))

    def __len__(self) -> int:
        return self.keys.numel()

    def at(
        self,
        position: Tensor | int | None = None,
        step: Tensor | int | None = None,
        draw: int | None = None,
    ) -> Rng:
        """The same rows at other counters; what is not given stays. An integer is for all rows."""
        return replace(
            self,
            position=self.position if position is None else self._counter("position", position),
            step=self.step if step is None else self._counter("step", step),
            draw=self.draw if draw is None else operator.index(draw),
        )

    def _counter(self, name: str, value: Tensor | int) -> Tensor:
        if isinstance(value, Tensor):
            check_dtype("Rng.at", name, value, torch.int32, torch.int64)
            return value.to(device=self.keys.device, dtype=torch.int32).expand_as(self.keys)
        if not 0 <= operator.index(value) < (1 << 31):
            raise ValueError(f"Rng.at: {name} must lie in 0..2^31-1, got {value}")
        return torch.full_like(self.keys, value, dtype=torch.int32)

    def take(self, index: Tensor | Sequence[int]) -> Rng:
        """Some of the rows, in the order of ``index`` (integers or a boolean mask, whose number of
        rows is waited for on a CUDA device)."""
        index = torch.as_tensor(index, device=self.keys.device)
        if index.numel() == 0 and index.dtype != torch.bool:
            index = index.to(torch.int64)
        return replace(
            self,
            keys=self.keys[index],
            position=None if self.position is None else self.position[index],
            step=None if self.step is None else self.step[index],
        )

    def to(self, device: torch.device | str) -> Rng:
        """The same numbers for tensors on another device."""
        return replace(
            self,
            keys=self.keys.to(device),
            position=None if self.position is None else self.position.to(device),
            step=None if self.step is None else self.step.to(device),
        )


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers out of uniform ones: ``-log(-log u)``."""
    return -torch.log(-torch.log(uniform))


def _times(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * factor; in halves, because int64 would overflow."""
    upper, lower = (word >> 16) * factor, (word & 0xFFFF) * factor
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & _MASK32
    return high, low


def philox4x32_ref(counter: Sequence[Tensor], keys: Tensor) -> tuple[Tensor, ...]:
    """The definition of Philox4x32-10: the four words of each block.

    ``counter``: four int64 tensors that hold 32 bits, ``keys``: int64; all broadcast together.
    """
    c0, c1, c2, c3 = (c & _MASK32 for c in counter)
    k0, k1 = keys & _MASK32, (keys >> 32) & _MASK32
    for _ in range(10):
        even_high, even_low = _times(c0, 0xD2511F53)
        odd_high, odd_low = _times(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = odd_high ^ c1 ^ k0, odd_low, even_high ^ c3 ^ k1, even_low
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def philox_words_ref(rng: Rng, columns: int) -> Tensor:
    """int64 [R, columns]: the 32-bit word that names column c of each row."""
    blocks = (columns + 3) // 4
    zeros_R = torch.zeros_like(rng.keys)
    position_R = zeros_R if rng.position is None else rng.position.to(torch.int64)
    step_R = zeros_R if rng.step is None else rng.step.to(torch.int64)
    block_1C = torch.arange(blocks, device=rng.keys.device)[None, :]
    counter = (block_1C, position_R[:, None], step_R[:, None], torch.full_like(block_1C, rng.draw))
    words = philox4x32_ref(counter, rng.keys[:, None])
    return torch.stack(words, dim=-1).reshape(len(rng), 4 * blocks)[:, :columns]


def philox_uniform_ref(rng: Rng, columns: int) -> Tensor:
    """The definition. Every backend must match it bit for bit."""
    word_RC = philox_words_ref(rng, columns)
    return ((word_RC >> 9).to(torch.float32) + 0.5) * 2.0**-23


@torch.library.custom_op("dlm_fast::philox_uniform", mutates_args=(), device_types="cpu")
def _philox_uniform(
    keys: Tensor, position: Tensor | None, step: Tensor | None, draw: int, columns: int
) -> Tensor:
    out = torch.empty(keys.numel(), columns, dtype=torch.float32)
    keys = keys.contiguous()
    position = None if position is None else position.contiguous()
    step = None if step is None else step.contiguous()
    extension().philox_uniform_cpu(
        keys.numel(), columns, draw, *addresses(keys, position, step, out), num_threads()
    )
    return out


@_philox_uniform.register_fake
def _(
    keys: Tensor, position: Tensor | None, step: Tensor | None, draw: int, columns: int
) -> Tensor:
    return torch.empty(keys.shape[0], columns, dtype=torch.float32, device=keys.device)


def philox_uniform(rng: Rng, columns: int) -> Tensor:
    """float32 [R, columns] of uniform numbers strictly between 0 and 1, named by ``rng``."""
    if columns < 0:
        raise ValueError(f"philox_uniform: columns must not be negative, got {columns}")
    refuse_cuda("philox_uniform", rng.keys)
    return _philox_uniform(rng.keys, rng.position, rng.step, rng.draw, columns)
