"""Problems for the language-model-head ops: data like a language model's, exact answers, levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dlm_fast import _C
from dlm_fast.ops._executor import emulated, executor_of

LEVELS = range(_C.best_simd_level() + 1)
"""0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16; those of this machine"""

BACKENDS = [*LEVELS, "emulated"]
"""and the CUDA path on the emulator"""

# Every value of every axis, with each kind of tail; (rows, width, vocabulary).
SHAPES = [
    (0, 64, 97),
    (1, 70, 5),
    (7, 123, 507),
    (64, 128, 512),
    (127, 896, 517),
    (128, 2048, 123),
    (129, 3584, 97),
    (252, 64, 4099),
    (1937, 70, 123),
    (7, 64, 32000),
    (1, 8, 126464),
    (5, 8, 151936),
]


@dataclass
class HeadProblem:
    """Arguments of a head op. ``hidden`` has more rows than are selected."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor
    bias: Tensor | None = None

    def exact(self) -> HeadProblem:
        """The same numbers in float64."""
        bias = None if self.bias is None else self.bias.double()
        return replace(self, hidden=self.hidden.double(), weight=self.weight.double(), bias=bias)

    def leaves(self) -> HeadProblem:
        """Fresh tensors that require grad."""
        hidden, weight, bias = (
            None if x is None else x.detach().clone().requires_grad_()
            for x in (self.hidden, self.weight, self.bias)
        )
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def to(self, device: torch.device) -> HeadProblem:
        fields = {name: None if x is None else x.to(device) for name, x in vars(self).items()}
        return HeadProblem(**fields)

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets


def problem(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    spare: int = 3,
    bias: bool = False,
) -> HeadProblem:
    """Rows of the head of norm 1, hidden states that lean towards their targets.

    The same numbers on every device; they lie on torch's default device.
    """
    with torch.device("cpu"):
        made = _problem(n, d, v, dtype, seed, spare, bias)
    return made.to(torch.get_default_device())


def _problem(
    n: int, d: int, v: int, dtype: torch.dtype, seed: int, spare: int, bias: bool
) -> HeadProblem:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=generator)
    weight /= weight.norm(dim=1, keepdim=True)
    targets = torch.randint(0, v, (n,), generator=generator)
    rows = torch.randperm(n + spare, generator=generator)[:n].to(torch.int32)
    hidden = 2 * torch.randn(n + spare, d, generator=generator)
    lean = 5 + 12 * torch.rand(n, 1, generator=generator)
    hidden[rows.long()] += lean * weight[targets]
    offset = torch.randn(v, generator=generator) if bias else None
    if offset is not None and dtype == torch.float64:
        offset = offset.double()
    return HeadProblem(hidden.to(dtype), weight.to(dtype), targets, rows, offset)


def cotangents(n: int, count: int = 3, seed: int = 1) -> list[Tensor]:
    """float64 [n] each, of mixed sign and size, some zero."""
    with torch.device("cpu"):
        made = _cotangents(n, count, seed)
    return list(made.to(torch.get_default_device()))


def _cotangents(n: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-2, 3, (count, n), generator=generator)
    values = size * torch.randn(count, n, generator=generator, dtype=torch.float64)
    values[torch.rand(count, n, generator=generator) < 0.1] = 0
    return values


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference, relative to that of the truth."""
    scale = float(truth.double().norm())
    error = float((ours.double() - truth.double()).norm())
    return error / scale if scale else error


def gradient_tolerance(gradient: Tensor, dtype: torch.dtype) -> float:
    """Relative error allowed to a gradient under inputs of a type.

    16-bit gradients are rounded up to twice (logit gradients, then the result); the errors of many
    numbers average out, those of a few need not. Gradients of biases stay in float32 on the CPU; on
    the CUDA path they are sums of rounded logit gradients.
    """
    if dtype == torch.float64:
        return 1e-13
    on_cpu = gradient.is_cpu and executor_of(gradient.device) is None
    if dtype == torch.float32 or (gradient.dim() == 1 and on_cpu):
        return 5e-6
    average = {torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
    if dtype == torch.bfloat16 and not on_cpu:
        # logit gradients of any number of rows are rounded there; where one row has nearly all the
        # weight, the errors of its largest entries (2^-9) do not average out
        average = 4e-3
    return average if int((gradient != 0).sum()) >= 64 else 3 * average


@contextmanager
def simd_level(level: int | str) -> Iterator[None]:
    """Runs the block on one of ``BACKENDS``."""
    if level == "emulated":
        with emulated("random", seed=3):
            yield
        return
    _C.set_simd_level(level)
    try:
        yield
    finally:
        _C.set_simd_level(_C.best_simd_level())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block on a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
